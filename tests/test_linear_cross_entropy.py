"""linear_cross_entropy: the head and its loss, against float64, in eager code and compiled."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import textbook
import torch
import torch.nn.functional as F
from harness import compile_without_codegen, misses, sites, without_codegen
from inputs import labels
from kernels import backwards_at_once
from pairwise import EVERYTHING
from reference import assert_fair, log_sum_exp
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import inductor_ce
from inductor_ce import ops
from inductor_ce.api import functional
from inductor_ce.api.functional import linear_cross_entropy
from inductor_ce.common.errors import InputError

B, S, D, V = 2, 6, 8, 37
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Head(NamedTuple):
    """What has a gradient."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def to(self, *args: Any) -> Head:
        return Head(*(None if x is None else x.to(*args) for x in self))


class Measured(NamedTuple):
    """A loss and its gradients with respect to the tensors of a head, None for those that are frozen."""

    value: Tensor
    gradients: tuple[Tensor | None, ...]


def head(*shape: int, bias: bool = True, dtype: torch.dtype = torch.float32, classes: int = V) -> Head:
    hidden, weight = torch.randn(*shape or (B, S), D), torch.randn(classes, D)
    return Head(hidden, weight, torch.randn(classes) if bias else None).to(dtype)


def probabilities() -> Tensor:
    return torch.randn(B, S, V).softmax(-1)


def measure(
    f: Callable[..., Tensor], given: Head, target: Tensor, upstream: Tensor | None = None, frozen: str = ""
) -> Measured:
    leaves = Head(*(None if x is None else x.detach().clone() for x in given))
    for name, leaf in leaves._asdict().items():
        if leaf is not None and name not in frozen:
            leaf.requires_grad_()
    value = f(leaves.hidden, leaves.weight, target, bias=leaves.bias)
    grad = torch.ones_like(value) if upstream is None else upstream.to(value.dtype).reshape(value.shape)
    value.backward(grad)
    return Measured(value.detach(), tuple(None if leaf is None else leaf.grad for leaf in leaves))


def by_the_book(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    shift: int = 0,
    mask: Tensor | None = None,
    class_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The linear, slices, and the textbook's loss in `dtype` of what they give."""
    k, rows = int(shift), hidden.shape[-2]
    z = F.linear(hidden, weight, bias)[..., : rows - k, :]
    target = target[:, k:] if k else target
    mask = mask[..., k:] if mask is not None and k else mask
    return textbook.cross_entropy(z, target, dtype=dtype, mask=mask, weight=class_weight, **options)


def check(
    given: Head,
    target: Tensor,
    f: Callable[..., Tensor] = linear_cross_entropy,
    upstream: Tensor | None = None,
    **options: Any,
) -> Measured:
    """f is as near to float64 as the textbook is where the logits have the dtype of the head."""
    dtype = ops.stats_dtype_of(given.hidden.dtype)
    ours = measure(functools.partial(f, **options), given, target, upstream)
    naive = measure(functools.partial(by_the_book, dtype=dtype, **options), given, target, upstream)
    exact = measure(functools.partial(by_the_book, **options), given.to(torch.float64), target, upstream)
    assert_fair(ours.value, naive.value, exact.value)
    for three in zip(ours.gradients, naive.gradients, exact.gradients, strict=True):
        if three[2] is not None:
            assert_fair(*three)
    return ours


def assert_same(a: Measured, b: Measured) -> None:
    torch.testing.assert_close(a.value, b.value, equal_nan=True)
    for x, y in zip(a.gradients, b.gradients, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "soft-cap": {"softcap": 5.0},
    "shift": {"shift": True},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss_weight": 1e-2},
    "mask": {"mask": True},
    "count": {"num_label_tokens": 7},
    "class weight": {"class_weight": True},
    "ignore_index": {"ignore_index": V - 1},
}
PAIRS = {f"{a}, {b}": OPTIONS[a] | OPTIONS[b] for a, b in itertools.combinations(OPTIONS, 2)}
ALL: dict[str, Any] = functools.reduce(dict.__or__, OPTIONS.values())
SOME = {"plain": {}, "all": ALL}


def labels_for(options: dict[str, Any]) -> Tensor:
    return labels(B, S, classes=V, every=4, ignore_index=options.get("ignore_index", -100))


def made(options: dict[str, Any]) -> dict[str, Any]:
    """Tensors where True stands for them."""
    tensors = {"class_weight": torch.rand(V), "mask": torch.arange(B * S).view(B, S) % 5 != 1}
    return {k: tensors.get(k, value) for k, value in options.items()}


# Against float64


@pytest.mark.in_turns
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("options", [{}, *OPTIONS.values(), ALL], ids=["plain", *OPTIONS, "all"])
def test_equals_float64(options: dict[str, Any], soft: bool, reduction: str) -> None:
    given = made(options)
    if reduction == "none":
        given.pop("num_label_tokens", None)
    rows = (B, S - given.get("shift", 0))
    upstream = torch.randn(rows) if reduction == "none" else torch.tensor(-0.37)
    target = probabilities() if soft else labels_for(options)
    ours = check(head(), target, upstream=upstream, reduction=reduction, **given)
    assert ours.value.shape == (rows if reduction == "none" else ())


@pytest.mark.parametrize("options", PAIRS.values(), ids=PAIRS)
def test_pairs_of_options(options: dict[str, Any]) -> None:
    check(head(bias=False), labels_for(options), upstream=torch.tensor(2.5), **made(options))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", SOME.values(), ids=SOME)
def test_every_dtype(options: dict[str, Any], dtype: torch.dtype) -> None:
    ours = check(head(dtype=dtype), labels_for(options), **made(options))
    assert ours.value.dtype == ops.stats_dtype_of(dtype)
    assert {g.dtype for g in ours.gradients if g is not None} == {dtype}


@pytest.mark.parametrize("shape", [(), (S,), (3, 4), (2, 3, 2), (4, 1)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    given = Head(torch.randn(*shape, D), torch.randn(V, D), None)
    loss = linear_cross_entropy(given.hidden, given.weight, torch.full(shape, 3), reduction="none")
    expected = F.cross_entropy((given.hidden @ given.weight.T).reshape(-1, V), torch.full((loss.numel(),), 3))
    assert loss.shape == shape
    torch.testing.assert_close(loss.mean(), expected)


@pytest.mark.parametrize(
    "reduce",
    [
        lambda loss: loss.sum(),
        lambda loss: 0.37 * loss.mean(),
        lambda loss: loss.sum() * 0,
        lambda loss: -(loss * torch.arange(B * S).view(B, S)).sum(),
        lambda loss: loss.square().sum(),
        lambda loss: (loss.T * torch.arange(B * S).view(S, B)).sum(),
        lambda loss: -F.logsigmoid(loss[0].sum() - loss[1].sum()),
    ],
)
def test_traps_2_and_3_upstream_gradients(reduce: Callable[[Tensor], Tensor]) -> None:
    def reduced(f: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: reduce(f(*args, reduction="none", **options, **kwargs))

    given, y = head(), labels(B, S, classes=V, every=4)
    ours = measure(reduced(linear_cross_entropy), given, y)
    naive = measure(reduced(by_the_book, dtype=torch.float32), given, y)
    exact = measure(reduced(by_the_book), given.to(torch.float64), y)
    for three in zip(ours.gradients, naive.gradients, exact.gradients, strict=True):
        assert_fair(*three)


def test_trap_23_a_second_backward_gives_the_same() -> None:
    hidden, weight, bias = (x.requires_grad_() for x in head())
    loss = linear_cross_entropy(
        hidden, weight, labels(B, S, classes=V, every=4), bias=bias, shift=1, z_loss_weight=0.1
    )
    leaves = (hidden, weight, bias)
    once, twice = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, twice))


# Odd rows


def plainly(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """As torch has it."""
    z = F.linear(hidden, weight, bias).flatten(0, -2)
    return F.cross_entropy(z, target.flatten(), **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 3), (1, 1)], ids=str)
def test_trap_16_hardly_anything_there(shape: tuple[int, ...], reduction: str) -> None:
    given = head(*shape)
    for y in (torch.full(shape, -100), torch.full(shape, 5)):
        ours = measure(functools.partial(linear_cross_entropy, reduction=reduction), given, y)
        assert_same(ours, measure(functools.partial(plainly, reduction=reduction), given, y))


@pytest.mark.parametrize("wrong", [-1, V, 2**40])
def test_trap_26_a_label_outside_makes_its_row_nan(wrong: int) -> None:
    given, y = head(), torch.arange(B * S).view(B, S) % V
    y[1, 2] = wrong
    ours = measure(functools.partial(linear_cross_entropy, reduction="none"), given, y)
    assert ours.value.isnan().nonzero().tolist() == [[1, 2]]
    assert ours.gradients[0].isnan().any(-1).nonzero().tolist() == [[1, 2]]
    assert linear_cross_entropy(given.hidden, given.weight, y).isnan()


def test_a_label_that_the_shift_drops_may_be_anything() -> None:
    given, y = head(), labels(B, S, classes=V, every=4)
    y[:, 0] = 2**40
    check(given, y, shift=1, class_weight=torch.rand(V), label_smoothing=0.1)


# The causal shift


@pytest.mark.parametrize("shape", [(S,), (B, S), (2, 1, S)], ids=str)
@pytest.mark.parametrize("shift", [0, 1, 3, S - 1])
def test_shift(shift: int, shape: tuple[int, ...]) -> None:
    hidden, weight, bias = head(*shape)
    y, mask = labels(*shape, classes=V, every=4), torch.rand(shape) > 0.3

    def sliced(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
        kept = hidden[..., : S - shift, :]
        where = torch.where(mask, target, -100)[..., shift:]
        return plainly(kept, weight, where, bias, reduction="none").view(where.shape)

    f = functools.partial(linear_cross_entropy, shift=shift, mask=mask, reduction="none")
    upstream = torch.randn(*shape[:-1], S - shift)
    given = Head(hidden, weight, bias)
    assert_same(measure(f, given, y, upstream), measure(sliced, given, y, upstream))


def test_true_is_a_shift_of_one() -> None:
    given, y = head(), labels(B, S, classes=V, every=4)
    by_shift = {
        k: measure(functools.partial(linear_cross_entropy, shift=k), given, y) for k in (True, 1, False)
    }
    assert_same(by_shift[True], by_shift[1])
    assert by_shift[False].value == linear_cross_entropy(given.hidden, given.weight, y, bias=given.bias)


def test_the_shift_copies_no_hidden_states() -> None:
    hidden, weight, _ = head(2, 64)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    compiled, graphs = compile_without_codegen(functools.partial(linear_cross_entropy, shift=1))
    compiled(*leaves, labels(2, 64, classes=V, every=4)).backward()
    forward = graphs.final[0]
    sized = [n for n in forward.graph.nodes if _elements(n) in (2 * 64 * D, 2 * 63 * D)]
    assert {n.target for n in sized if n.op == "call_function"} <= {torch.ops.aten.view.default}


def _elements(node: torch.fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) and value.is_floating_point() else 0


# The lse


@pytest.mark.parametrize("shift", [False, 1, 2])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_lse_is_that_of_the_rows_with_a_target(softcap: float | None, shift: int) -> None:
    hidden, weight, bias = head()
    y = labels(B, S, classes=V, every=4)
    _, lse = linear_cross_entropy(hidden, weight, y, bias=bias, softcap=softcap, shift=shift, return_lse=True)
    z = F.linear(hidden, weight, bias)[:, : S - shift]
    torch.testing.assert_close(
        lse, (z if softcap is None else softcap * torch.tanh(z / softcap)).logsumexp(-1)
    )


@pytest.mark.parametrize("shift", [False, 1])
@pytest.mark.parametrize("compile_it", [False, True])
def test_a_z_loss_of_ones_own(compile_it: bool, shift: int) -> None:
    """As CCE's compute_z_loss: over the targets that count. It equals ours, and is as near to float64."""

    def z_loss(lse: Tensor, y: Tensor) -> Tensor:
        counts = y[:, int(shift) :] != -100
        return torch.where(counts, lse.square(), 0.0).sum() / counts.sum()

    def own(hidden: Tensor, weight: Tensor, y: Tensor, *, bias: Tensor) -> Tensor:
        loss, lse = linear_cross_entropy(hidden, weight, y, bias=bias, shift=shift, return_lse=True)
        return loss + 0.25 * z_loss(lse, y)

    f = torch.compile(own, backend="aot_eager", fullgraph=True) if compile_it else own
    given, y = head(), labels(B, S, classes=V, every=4)
    built_in = check(given, y, shift=shift, z_loss_weight=0.25)
    assert_same(measure(f, given, y), built_in)


def test_the_lse_alone_has_a_gradient() -> None:
    def lse(hidden: Tensor, weight: Tensor, y: Tensor, *, bias: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, y, bias=bias, return_lse=True)[1]

    def exact(hidden: Tensor, weight: Tensor, y: Tensor, *, bias: Tensor) -> Tensor:
        return log_sum_exp(hidden @ weight.T + bias)

    given, y, upstream = head(), torch.full((B, S), -100), torch.randn(B, S)
    assert_same(measure(lse, given, y, upstream), measure(exact, given, y, upstream))


# What is frozen


@pytest.mark.in_turns
@pytest.mark.parametrize("compile_it", [False, True])
@pytest.mark.parametrize(
    ("frozen", "products"), [("", 3), ("weight", 2), ("hidden", 2), ("hidden weight", 1), ("weight bias", 2)]
)
def test_what_is_frozen_gets_no_gradient(frozen: str, products: int, compile_it: bool) -> None:
    f, graphs = compile_without_codegen(linear_cross_entropy) if compile_it else (linear_cross_entropy, None)
    given, y = head(), labels(B, S, classes=V, every=4)
    ours = measure(f, given, y, frozen=frozen)
    whole = measure(by_the_book, given.to(torch.float64), y)
    for name, gradient, expected in zip(Head._fields, ours.gradients, whole.gradients, strict=True):
        if name in frozen:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)
    if graphs is not None:
        found = graphs.count(torch.ops.aten.mm.default) + graphs.count(torch.ops.aten.addmm.default)
        assert found == products


def test_no_gradient_at_all() -> None:
    hidden, weight, bias = head()
    with torch.no_grad():
        assert not linear_cross_entropy(
            hidden.requires_grad_(), weight, labels(B, S, classes=V, every=4), bias=bias
        ).requires_grad


# Dtypes


@pytest.mark.parametrize("compile_it", [False, True])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_that_of_a_linear_layer(hidden_dtype: torch.dtype, compile_it: bool) -> None:
    given = head()._replace(hidden=torch.randn(B, S, D).to(hidden_dtype))
    f = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True) if compile_it else None
    with torch.autocast("cpu", torch.bfloat16):
        ours = measure(f or linear_cross_entropy, given, labels(B, S, classes=V, every=4))
        torch.manual_seed(1)
        y = labels(B, S, classes=V, every=4)
        ours, theirs = measure(f or linear_cross_entropy, given, y), measure(plainly_in_float32, given, y)
    assert_same(ours, theirs)
    assert ours.gradients[0].dtype == hidden_dtype
    assert ours.gradients[1].dtype == torch.float32


def plainly_in_float32(hidden: Tensor, weight: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float().flatten(0, 1), y.flatten())


# Refusals

H, W, Y = torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: linear_cross_entropy(H.long(), W, Y),
        "hidden must be floating point [..., D], got torch.int64 [2, 4]",
    ),
    (
        lambda: linear_cross_entropy(H[0, 0], W, Y),
        "hidden must be floating point [..., D], got torch.float32 []",
    ),
    (
        lambda: linear_cross_entropy(H, W.T, Y),
        "weight must be floating point [V, D] for hidden [2, 4], whose D is last, got torch.float32 [4, 3]",
    ),
    (
        lambda: linear_cross_entropy(H, W[0], Y),
        "weight must be floating point [V, D] for hidden [2, 4], whose D is last, got torch.float32 [4]",
    ),
    (
        lambda: linear_cross_entropy(H, W, Y, bias=torch.zeros(4)),
        "bias must be floating point [V] for weight [3, 4], got torch.float32 [4]",
    ),
    (
        lambda: linear_cross_entropy(H.bfloat16(), W, Y),
        "weight is torch.float32 and hidden torch.bfloat16: give both the same dtype, "
        "or call under torch.autocast",
    ),
    (
        lambda: linear_cross_entropy(H, W, Y, bias=torch.zeros(3).half()),
        "bias is torch.float16 and hidden torch.float32: give both the same dtype, "
        "or call under torch.autocast",
    ),
    (lambda: linear_cross_entropy(H, W.to("meta"), Y), "weight is on meta and hidden on cpu"),
    (lambda: linear_cross_entropy(H, W, Y.to("meta")), "target is on meta and hidden on cpu"),
    (
        lambda: linear_cross_entropy(H, W, Y[:1]),
        "target must be class indices [2] or probabilities [2, 3] for hidden [2, 4] and weight [3, 4], "
        "classes last, got torch.int64 [1]",
    ),
    (
        lambda: linear_cross_entropy(H, W, torch.ones(2, 4)),
        "target must be class indices [2] or probabilities [2, 3] for hidden [2, 4] and weight [3, 4], "
        "classes last, got torch.float32 [2, 4]",
    ),
    (
        lambda: linear_cross_entropy(H, W, Y.bool()),
        "target must be class indices or probabilities, got torch.bool [2]",
    ),
    (
        lambda: linear_cross_entropy(H, W, torch.rand(2, 3, requires_grad=True)),
        "target requires a gradient and would get none; pass target.detach()",
    ),
    (
        lambda: linear_cross_entropy(H, W, Y, mask=torch.ones(3)),
        "mask must be [2], as the rows of hidden, got torch.float32 [3]",
    ),
    (
        lambda: linear_cross_entropy(H, W, Y, class_weight=torch.ones(2)),
        "class_weight has 2 classes and weight has 3",
    ),
    (
        lambda: linear_cross_entropy(H, W, Y, class_weight=torch.ones(1, 3)),
        "class_weight must be floating point [V], got torch.float32 [1, 3]",
    ),
    (
        lambda: linear_cross_entropy(H, W, Y, class_weight=torch.ones(3, requires_grad=True)),
        "class_weight requires a gradient and would get none; pass class_weight.detach()",
    ),
    (
        lambda: linear_cross_entropy(H, W, Y, class_weight=-torch.ones(3)),
        "class_weight must not be negative, NaN or infinite, got tensor([-1., -1., -1.])",
    ),
    (
        lambda: linear_cross_entropy(H, W, Y, z_loss_weight=-1.0),
        "z_loss_weight must not be negative, NaN or infinite, got -1.0",
    ),
    *(
        (
            functools.partial(linear_cross_entropy, H, W, Y, shift=shift),
            f"shift must be False, True or an int in [0, 2), the rows of hidden [2, 4], got {shift!r}",
        )
        for shift in (2, -1, 0.5)
    ),
    (
        lambda: linear_cross_entropy(H[0], W, Y[0], shift=True),
        "shift must be False, True or an int in [0, 0), the rows of hidden [4], got True",
    ),
    (
        lambda: linear_cross_entropy(H, W, Y, reduction="avg"),
        "reduction must be one of 'none', 'mean', 'sum', got 'avg'",
    ),
    (
        lambda: linear_cross_entropy(H, W, Y, label_smoothing=1.5),
        "label_smoothing must be in [0, 1], got 1.5",
    ),
    (lambda: linear_cross_entropy(H, W, Y, softcap=-1.0), "softcap must be positive and finite, got -1.0"),
    (
        lambda: linear_cross_entropy(H, W, Y, num_label_tokens=2, reduction="none"),
        "num_label_tokens divides a sum: reduction must be 'sum' or 'mean', got 'none'",
    ),
    (
        lambda: linear_cross_entropy(H, W, Y, num_label_tokens=torch.ones(1)),
        "num_label_tokens must be a number or a tensor [], got torch.float32 [1]",
    ),
    (
        lambda: linear_cross_entropy(H, W, Y, vocab_start=1),
        "vocab_start is where a shard starts: it needs a group",
    ),
]


@pytest.mark.parametrize(("call", "text"), REFUSED, ids=[text[:50] for _, text in REFUSED])
def test_refusals(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value) == text


# Compiled


def test_compiled_equals_float64() -> None:
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    with backwards_at_once():
        check(head(dtype=torch.bfloat16), labels_for(ALL), compiled, **made(ALL))


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
def test_compiled_equals_eager(options: dict[str, Any]) -> None:
    given, y, options = head(), labels_for(options), made(options)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    ours = measure(functools.partial(compiled, **options), given, y)
    assert_same(ours, measure(functools.partial(linear_cross_entropy, **options), given, y))


def test_the_graph_is_a_head_and_its_statistics() -> None:
    """Three products and the two operators, for the joint pass to find; nothing is recognised twice."""
    compiled, graphs = compile_without_codegen(linear_cross_entropy)
    measure(functools.partial(compiled, shift=1), head(bias=False), labels(B, S, classes=V, every=4))
    assert (sites(), misses()) == (0, 0)
    assert graphs.count(torch.ops.aten.mm.default) == 3
    assert graphs.count(ops.ROW_STATS) == graphs.count(ops.ROW_GRAD) == 1


def test_eight_lengths() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    options: dict[str, Any] = {"shift": 1, "label_smoothing": 0.1}
    compiled = torch.compile(
        functools.partial(linear_cross_entropy, **options), backend=counter, fullgraph=True
    )
    for n in (12, 17, 5, 31, 8, 23, 3, 29):
        check(
            head(2, n),
            labels(2, n, classes=V, every=4),
            lambda *args, **given: compiled(*args, bias=given["bias"]),
            **options,
        )
    assert counter.frame_count <= 2


@pytest.fixture
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch):
    """Eager calls where there is a GPU run compiled code. A CPU stands in for one here."""
    monkeypatch.setattr(functional, "COMPILED_ON", ("cpu",))
    functional._compiled.cache_clear()
    yield
    functional._compiled.cache_clear()


@pytest.mark.usefixtures("cpu_as_gpu")
def test_eager_calls_run_compiled_code() -> None:
    def check_length(n: int, w: float) -> None:
        options = {"z_loss_weight": w, "num_label_tokens": n, "shift": True}
        check(head(2, n, dtype=torch.bfloat16), labels(2, n, classes=V, every=4), **options)

    with without_codegen():  # a length that is known is that of test_compiled_equals_float64
        check_length(12, 1e-3)
    with contextlib.nullcontext() if EVERYTHING else without_codegen():  # which test_functional.py has
        for n, w in ((17, 2e-3), (5, 0.0)):
            check_length(n, w)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


def test_it_is_exported() -> None:
    assert inductor_ce.linear_cross_entropy is linear_cross_entropy


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", SOME.values(), ids=SOME)
def test_gpu_eager_equals_float64(options: dict[str, Any], dtype: torch.dtype) -> None:
    def on_gpu(*args: Tensor, **given: Any) -> Tensor:
        there = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in given.items()}
        return linear_cross_entropy(*(x.cuda() for x in args), **there).cpu()

    check(head(dtype=dtype), labels_for(options), on_gpu, **made(options))


@pytest.mark.gpu
def test_trap_24_gpu_eager_waits_for_nothing() -> None:
    hidden = torch.randn(4, 16, 32, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 32, device="cuda", requires_grad=True)
    y = torch.randint(0, 1000, (4, 16), device="cuda")

    def step(i: int) -> None:
        linear_cross_entropy(
            hidden, weight, y, shift=1, z_loss_weight=1e-4 * i, num_label_tokens=i
        ).backward()

    for i in range(1, 4):
        step(i)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(4, 7):
            step(i)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# torch's own form


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has it from 2.13 on")
@pytest.mark.parametrize("how", ["function", "module", "with options"])
def test_torchs_own_form(how: str) -> None:
    """It is a linear layer and a loss, fused as such; with options it is chunks of torch's, left alone."""
    h, w, y = torch.randn(32, 8).double(), torch.randn(64, 8).double(), torch.randint(64, (32,))
    options = nn.LinearCrossEntropyOptions() if how == "with options" else None

    def loss(h: Tensor, w: Tensor) -> Tensor:
        if how != "module":
            return F.linear_cross_entropy(h, w, y, options=options)
        module = nn.LinearCrossEntropyLoss(8, 64, dtype=torch.float64)
        return torch.func.functional_call(module, {"linear.weight": w}, (h, y))

    def of(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = h.clone().requires_grad_(), w.clone().requires_grad_()
        value = f(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    compiled, _ = compile_without_codegen(loss)
    torch.testing.assert_close(of(compiled), of(lambda h, w: F.cross_entropy(h @ w.t(), y)))
    assert sites() == (how != "with options")
    assert misses() == 0
