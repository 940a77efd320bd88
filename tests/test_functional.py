"""The functional form: what it computes, what it refuses, and how often it compiles."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import textbook
import torch
import torch.nn.functional as F
from harness import compile_without_codegen, misses, sites, without_codegen
from inputs import labels, logits
from kernels import backwards_at_once
from pairwise import EVERYTHING, in_turns
from reference import Measured, assert_as_fair, measure
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from inductor_ce import ops
from inductor_ce.api import functional
from inductor_ce.api.functional import cross_entropy
from inductor_ce.common.errors import InductorCEError, InputError

N, V = 12, 37
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def probabilities(*shape: int) -> Tensor:
    return torch.randn(*shape or (N, V)).softmax(-1)


def class_weights(classes: int = V) -> Tensor:
    w = torch.rand(classes)
    w[5 % classes] = 0.0
    return w


def dtype_of_loss(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def check(
    z: Tensor,
    target: Tensor,
    f: Callable[..., Tensor] = cross_entropy,
    upstream: Tensor | None = None,
    **options: Any,
) -> Measured:
    """f is as near to float64 as the textbook is in the dtype of the loss; what f gives."""
    naive = functools.partial(textbook.cross_entropy, dtype=dtype_of_loss(z), **options)
    exact = functools.partial(textbook.cross_entropy, **options)
    ours = measure(functools.partial(f, **options), z, target, upstream=upstream)
    assert_as_fair(
        ours,
        measure(naive, z, target, upstream=upstream),
        measure(exact, z.double(), target, upstream=upstream),
    )
    return ours


def bits(z: Tensor, target: Tensor, **options: Any) -> Measured:
    return measure(functools.partial(cross_entropy, **options), z, target)


def assert_same_bits(a: Measured, b: Measured) -> None:
    assert torch.equal(a.value, b.value)
    assert torch.equal(a.gradient, b.gradient)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "all smoothing": {"label_smoothing": 1.0},
    "weight": {"weight": True},
    "weight and smoothing": {"weight": True, "label_smoothing": 0.2},
    "z-loss": {"z_loss_weight": 1e-2},
    "soft-cap": {"softcap": 5.0},
    "mask": {"mask": True},
    "all": {"weight": True, "label_smoothing": 0.2, "z_loss_weight": 0.1, "softcap": 9.0, "mask": True},
}


def made(options: dict[str, Any]) -> dict[str, Any]:
    """Tensors where True stands for them."""
    tensors = {"weight": class_weights(), "mask": torch.arange(N) % 4 != 1}
    return {k: tensors[k] if value is True else value for k, value in options.items()}


# Against float64


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_float64(options: dict[str, Any], soft: bool, reduction: str) -> None:
    target = probabilities() if soft else labels(N, classes=V)
    upstream = torch.randn(N) if reduction == "none" else torch.tensor(-0.37)
    check(logits(N, V), target, upstream=upstream, reduction=reduction, **made(options))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_every_dtype(dtype: torch.dtype, soft: bool) -> None:
    z = logits(N, V, dtype=dtype)
    target = probabilities().to(dtype) if soft else labels(N, classes=V)
    ours = check(z, target, **made(OPTIONS["all"]))
    assert ours.value.dtype == dtype_of_loss(z)
    assert ours.gradient.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_narrow_labels(dtype: torch.dtype) -> None:
    """156 is -100 in 8 bits."""
    z, y = logits(N, 200), torch.arange(N) + 150
    check(z, y.to(dtype), ignore_index=-100, reduction="none")


@pytest.mark.parametrize(
    "shape", [(N,), (2, 6), (3, 4), (2, 3, 2), ()], ids=["[N]", "[B,S]", "[S,B]", "[A,B,S]", "[]"]
)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_leading_dimensions(shape: tuple[int, ...], reduction: str) -> None:
    y = torch.randint(0, V, shape)
    ours = check(logits(*shape, V), y, reduction=reduction, label_smoothing=0.1)
    assert ours.value.shape == (shape if reduction == "none" else ())


@pytest.mark.parametrize(
    "view",
    [lambda z: z.transpose(0, 1), lambda z: z[:, :-1], lambda z: z[..., ::2], lambda z: z.mT.contiguous().mT],
    ids=["transposed", "shifted", "every other class", "column major"],
)
def test_strides(view: Callable[[Tensor], Tensor]) -> None:
    z = view(logits(4, 5, V))
    check(z, labels(*z.shape[:-1], classes=z.shape[-1]), reduction="none")


@pytest.mark.parametrize(
    "reduce",
    [
        lambda loss: loss.sum(),
        lambda loss: 0.37 * loss.mean(),
        lambda loss: -(loss * torch.arange(N).view(3, 4)).sum(),
        lambda loss: loss.sum() * 0,
        lambda loss: loss.square().sum(),
        lambda loss: (loss.T * torch.arange(N).view(4, 3)).sum(),
        lambda loss: loss[1:, ::2].mean(),
    ],
)
def test_traps_2_and_3_upstream_gradients(reduce: Callable[[Tensor], Tensor]) -> None:
    def reduced(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda z, y, **options: reduce(f(z, y, reduction="none", **options))

    z, y = logits(3, 4, V), labels(3, 4, classes=V)
    ours = measure(reduced(cross_entropy), z, y)
    naive = measure(reduced(functools.partial(textbook.cross_entropy, dtype=torch.float32)), z, y)
    assert_as_fair(ours, naive, measure(reduced(textbook.cross_entropy), z.double(), y))


def test_a_second_backward_gives_the_same() -> None:
    z = logits(N, V).requires_grad_()
    loss = cross_entropy(z, labels(N, classes=V), z_loss_weight=0.1)
    once, twice = (torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)


def test_large_gaps() -> None:
    """Where log(softmax) underflows."""
    check(1000 * logits(N, V), labels(N, classes=V), reduction="none", label_smoothing=0.1)


# As F.cross_entropy


def as_torch(z: Tensor, target: Tensor, **options: Any) -> Measured:
    """`F.cross_entropy` with the classes last and the loss in float32."""

    def loss(z: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(z.to(dtype_of_loss(z)), target, **options)

    return measure(loss, z, target)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, V - 1, V + 5])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": True, "label_smoothing": 0.3}])
def test_trap_25_ignore_index(options: dict[str, Any], ignore_index: int, reduction: str) -> None:
    given = {**made(options), "ignore_index": ignore_index, "reduction": reduction}
    z, y = logits(N, V), labels(N, classes=V, ignore_index=ignore_index)
    ours = check(z, y, **given)
    theirs = as_torch(z, y, **given)
    torch.testing.assert_close(ours.value, theirs.value)
    torch.testing.assert_close(ours.gradient, theirs.gradient)
    assert torch.equal(ours.gradient[y == ignore_index], torch.zeros_like(z[y == ignore_index]))


def odd_rows(value: float) -> tuple[Tensor, Tensor]:
    z, y = logits(4, 6), torch.tensor([2, 1, 0, 3])
    z[1], z[2, 3] = value, value
    return z, y


ODD: dict[str, tuple[Tensor, Tensor]] = {
    "all ignored": (torch.ones(3, 5), torch.full((3,), -100)),
    "N=0": (torch.ones(0, 5), torch.ones(0, dtype=torch.int64)),
    "N=1": (torch.arange(5.0)[None], torch.tensor([3])),
    "V=1": (torch.ones(3, 1), torch.zeros(3, dtype=torch.int64)),
    "one valid token": (torch.eye(4, 5), torch.tensor([-100, -100, 2, -100])),
    "-inf": odd_rows(-torch.inf),
    "+inf": odd_rows(torch.inf),
    "NaN": odd_rows(torch.nan),
    "an ignored row of -inf": (torch.full((1, 5), -torch.inf), torch.tensor([-100])),
    "probabilities, N=0": (torch.ones(0, 5), torch.ones(0, 5)),
    "probabilities, -inf": (odd_rows(-torch.inf)[0], torch.full((4, 6), 1 / 6)),
    "probabilities, 0 at -inf": (odd_rows(-torch.inf)[0], torch.eye(4, 6)),
}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("case", ODD)
def test_trap_16_odd_rows_are_as_in_torch(case: str, smoothing: float, reduction: str) -> None:
    z, target = ODD[case]
    if smoothing and case == "probabilities, 0 at -inf":
        pytest.skip("0 * inf is NaN here, where torch smooths the 0 first and has inf")
    ours = bits(z, target, reduction=reduction, label_smoothing=smoothing)
    theirs = as_torch(z, target, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(ours.value, theirs.value, equal_nan=True)
    torch.testing.assert_close(ours.gradient, theirs.gradient, equal_nan=True)


@pytest.mark.parametrize("wrong", [-1, V, V + 1, -V, 2**40])
def test_trap_26_a_label_outside_makes_its_row_nan(wrong: int) -> None:
    z, y = logits(N, V), torch.arange(N)
    y[4] = wrong
    options = {"reduction": "none", "label_smoothing": 0.1, "weight": class_weights()}
    ours = bits(z, y, **options)
    others = torch.arange(N) != 4
    assert ours.value[4].isnan()
    assert ours.gradient[4].isnan().all()
    alone = bits(z[others], y[others], **options)
    assert_same_bits(Measured(ours.value[others], ours.gradient[others]), alone)
    assert cross_entropy(z, y).isnan()
    assert not cross_entropy(z, y, mask=others).isnan()


# z-loss


@pytest.mark.parametrize("zero", [0.0, 0, torch.tensor(0.0)], ids=["float", "int", "tensor"])
def test_trap_21_a_weight_of_zero_is_none(zero: float | Tensor) -> None:
    z, y = logits(N, V), labels(N, classes=V)
    assert_same_bits(bits(z, y, z_loss_weight=zero), bits(z, y))
    assert_same_bits(bits(z, y, z_loss_weight=zero, label_smoothing=0.1), bits(z, y, label_smoothing=0.1))
    huge = torch.full((1, V), 1e30)
    assert_same_bits(bits(huge, y[1:2], z_loss_weight=zero), bits(huge, y[1:2]))


def test_trap_21_no_smoothing_is_none() -> None:
    z, y = logits(N, V), labels(N, classes=V)
    assert_same_bits(bits(z, y, label_smoothing=0.0), bits(z, y))


def test_z_loss_scales_the_softmax_before_smoothing() -> None:
    """dz = (1 + 2 w lse) p - (1 - eps) [i = y] - eps / V, and 0 in ignored rows."""
    z, y = logits(N, V, dtype=torch.float64), labels(N, classes=V)
    w, smoothing = 0.25, 0.1
    lse = z.exp().sum(-1).log()
    one_hot = (torch.arange(V) == y[:, None]).double()
    expected = (1 + 2 * w * lse)[:, None] * (z - lse[:, None]).exp() - (1 - smoothing) * one_hot
    expected = torch.where((y != -100)[:, None], expected - smoothing / V, 0.0)
    ours = bits(z, y, reduction="sum", z_loss_weight=w, label_smoothing=smoothing)
    torch.testing.assert_close(ours.gradient, expected)


def test_a_weight_as_a_tensor() -> None:
    z, y = logits(N, V), labels(N, classes=V)
    assert_same_bits(bits(z, y, z_loss_weight=torch.tensor(0.25)), bits(z, y, z_loss_weight=0.25))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_lse_is_differentiable(reduction: str) -> None:
    """The user's own z-loss equals ours."""
    z, y = logits(3, 4, V), labels(3, 4, classes=V)

    def own(z: Tensor, y: Tensor) -> Tensor:
        loss, lse = cross_entropy(z, y, reduction=reduction, return_lse=True)
        assert lse.shape == y.shape
        term = torch.where(y != -100, 0.25 * lse.square(), 0.0)
        return loss + (term if reduction == "none" else term.sum() / (y != -100).sum())

    ours = measure(own, z, y)
    built_in = bits(z, y, reduction=reduction, z_loss_weight=0.25)
    torch.testing.assert_close(ours.value, built_in.value)
    torch.testing.assert_close(ours.gradient, built_in.gradient)


def test_lse_is_that_of_the_capped_logits() -> None:
    z, y = logits(N, V), labels(N, classes=V)
    _, lse = cross_entropy(z, y, softcap=2.0, return_lse=True)
    torch.testing.assert_close(lse, torch.logsumexp(2.0 * torch.tanh(z / 2.0), -1))


# As NeMo AutoModel's


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_mask_is_folded_into_the_labels(mask_dtype: torch.dtype, reduction: str) -> None:
    z, y = logits(2, 6, V), labels(2, 6, classes=V)
    mask = (torch.arange(12).view(2, 6) % 5 != 2).to(mask_dtype)
    before = y.clone(), mask.clone(), z.clone()
    ours = check(z, y, mask=mask, reduction=reduction)
    folded = torch.where(mask != 0, y, -100)
    assert_same_bits(ours, bits(z, folded, reduction=reduction))
    assert all(map(torch.equal, before, (y, mask, z)))


@pytest.mark.parametrize("count", [7, torch.tensor(7), torch.tensor(7.0)], ids=["int", "tensor", "float"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_num_label_tokens(count: int | Tensor, reduction: str) -> None:
    check(logits(N, V), labels(N, classes=V), num_label_tokens=count, reduction=reduction, z_loss_weight=0.1)


# Refusals

Z, Y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: cross_entropy(Z.long(), Y),
        "logits must be floating point [..., V], got torch.int64 [2, 3]",
    ),
    (lambda: cross_entropy(Z[0, 0], Y), "logits must be floating point [..., V], got torch.float32 []"),
    (
        lambda: cross_entropy(Z, Y[:1]),
        "target must be class indices [2] or probabilities [2, 3] for logits [2, 3], classes last, "
        "got torch.int64 [1]",
    ),
    (
        lambda: cross_entropy(Z, Y.float()),
        "target must be class indices [2] or probabilities [2, 3] for logits [2, 3], classes last, "
        "got torch.float32 [2]",
    ),
    (
        lambda: cross_entropy(Z, Y.bool()),
        "target must be class indices or probabilities, got torch.bool [2]",
    ),
    (
        lambda: cross_entropy(Z, torch.rand(2, 3, requires_grad=True)),
        "target requires a gradient and would get none; pass target.detach()",
    ),
    (lambda: cross_entropy(Z, Y, weight=torch.ones(2)), "weight has 2 classes and logits have 3"),
    (
        lambda: cross_entropy(Z, Y, weight=torch.ones(1, 3)),
        "weight must be floating point [V], got torch.float32 [1, 3]",
    ),
    (
        lambda: cross_entropy(Z, Y, weight=torch.ones(3, requires_grad=True)),
        "weight requires a gradient and would get none; pass weight.detach()",
    ),
    (
        lambda: cross_entropy(Z, Y, mask=torch.ones(3)),
        "mask must be [2], as the rows of logits, got torch.float32 [3]",
    ),
    (lambda: cross_entropy(Z, Y.to("meta")), "target is on meta and logits on cpu"),
    (
        lambda: cross_entropy(Z, Y, reduction="avg"),
        "reduction must be one of 'none', 'mean', 'sum', got 'avg'",
    ),
    (lambda: cross_entropy(Z, Y, label_smoothing=1.5), "label_smoothing must be in [0, 1], got 1.5"),
    (lambda: cross_entropy(Z, Y, softcap=0.0), "softcap must be positive and finite, got 0.0"),
    (
        lambda: cross_entropy(Z, Y, num_label_tokens=2, reduction="none"),
        "num_label_tokens divides a sum: reduction must be 'sum' or 'mean', got 'none'",
    ),
    (
        lambda: cross_entropy(Z, Y, num_label_tokens=torch.ones(1)),
        "num_label_tokens must be a number or a tensor [], got torch.float32 [1]",
    ),
    (
        lambda: cross_entropy(Z, Y, vocab_start=1),
        "vocab_start is where a shard starts: it needs a group",
    ),
]


@pytest.mark.parametrize(("call", "text"), REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_refusals(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value) == text
    assert isinstance(error.value, (InductorCEError, ValueError))


BAD = [-1e-3, -torch.inf, torch.inf, torch.nan]


@pytest.mark.parametrize("bad", BAD)
def test_bad_weights_raise(bad: float) -> None:
    weight = torch.tensor([1.0, bad, 1.0])
    with pytest.raises(InputError, match="weight must not be negative, NaN or infinite, got"):
        cross_entropy(Z, Y, weight=weight)
    for w in (bad, torch.tensor(bad)):
        with pytest.raises(InputError, match="z_loss_weight must not be negative, NaN or infinite, got"):
            cross_entropy(Z, Y, z_loss_weight=w)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_bad_tensors_make_compiled_losses_nan(soft: bool) -> None:
    """Their values cannot be looked at without waiting for them."""
    target = torch.ones(2, 3) if soft else Y
    compiled = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
    for bad in BAD:
        assert compiled(Z, target, z_loss_weight=torch.tensor(bad)).isnan(), bad
        assert compiled(Z, target, weight=torch.tensor([1.0, bad, 1.0])).isnan(), bad
    assert compiled(Z, target, weight=torch.ones(3), z_loss_weight=torch.tensor(1.0)).isfinite()


@pytest.mark.parametrize("bad", BAD)
def test_bad_numbers_raise_under_compile(bad: float) -> None:
    compiled = torch.compile(cross_entropy, backend="aot_eager")
    with pytest.raises(InputError, match="z_loss_weight must not be negative, NaN or infinite"):
        compiled(Z, Y, z_loss_weight=bad)


# Compiled


BACKENDS = ["inductor", *["inductor_ce"] * EVERYTHING]
COMPILED = in_turns(["plain", "all"], ["indices", "probabilities"], BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_float64(backend: str) -> None:
    """In one graph, each of its own logits. Nothing falls back on the operators, nor without `install`."""
    targets = {"indices": labels(N, classes=V), "probabilities": probabilities()}
    cases = [(targets[kind], made(OPTIONS[name])) for name, kind, by in COMPILED if by == backend]
    zs = [logits(N, V, dtype=torch.bfloat16).requires_grad_() for _ in cases]

    @functools.partial(torch.compile, backend=backend, fullgraph=True)
    def losses(*zs: Tensor) -> list[Tensor]:
        return [cross_entropy(z, target, **options) for z, (target, options) in zip(zs, cases, strict=True)]

    def one_of_them(z: Tensor, target: Tensor, *, i: int, **options: Any) -> Tensor:
        return losses(*zs[:i], z, *zs[i + 1 :])[i]

    def check_each() -> None:
        for i, (target, options) in enumerate(cases):
            check(zs[i], target, functools.partial(one_of_them, i=i), **options)

    with backwards_at_once():
        _, sources = run_and_get_code(check_each)
    assert len(sources) == 2
    assert not any("inductor_ce.row_" in source for source in sources)


def test_what_is_called_is_not_recognised_again() -> None:
    """Neither as a site nor as a miss."""
    compiled, graphs = compile_without_codegen(
        lambda z, y: cross_entropy(z, y, label_smoothing=0.1, softcap=5.0, z_loss_weight=0.1, weight=w)
    )
    w = class_weights()
    z = logits(N, V).requires_grad_()
    compiled(z, labels(N, classes=V)).backward()
    assert (sites(), misses()) == (0, 0)
    assert graphs.count(ops.ROW_STATS) == graphs.count(ops.ROW_GRAD) == 1


def test_trap_28_only_the_raw_logits_are_saved() -> None:
    compiled, graphs = compile_without_codegen(lambda z, y: cross_entropy(z, y, softcap=5.0))
    z = logits(N, V, dtype=torch.bfloat16).requires_grad_()
    compiled(z, labels(N, classes=V)).backward()
    (returned,) = graphs.final[0].graph.output_node().args
    large = [n for n in returned if n is not None and n.meta["val"].numel() >= z.numel()]
    assert [n.op for n in large] == ["placeholder"]


def test_eager_saves_no_copy_of_the_logits() -> None:
    z = logits(N, V, dtype=torch.bfloat16).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cross_entropy(z, labels(N, classes=V), label_smoothing=0.1, z_loss_weight=0.1)
    assert {t.data_ptr() for t in saved if t.numel() >= z.numel()} == {z.data_ptr()}


# How often it compiles


def counted(
    f: Callable[..., Tensor], **kwargs: Any
) -> tuple[Callable[..., Tensor], CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(f, backend=counter, fullgraph=True, **kwargs), counter


def test_a_changing_z_loss_weight() -> None:
    """Dynamo takes a float for a constant until it changes once."""
    compiled, counter = counted(lambda z, y, w: cross_entropy(z, y, z_loss_weight=w))
    for w in (1e-4, 2e-4, 0.0, 3e-3, 0.5):
        check(
            logits(N, V),
            labels(N, classes=V),
            lambda z, y, z_loss_weight: compiled(z, y, z_loss_weight),
            z_loss_weight=w,
        )
    assert counter.frame_count <= 2


def test_a_changing_z_loss_weight_in_a_tensor() -> None:
    compiled, counter = counted(lambda z, y, w: cross_entropy(z, y, z_loss_weight=w))
    for w in (1e-4, 2e-4, 0.0, 3e-3, 0.5):
        check(
            logits(N, V),
            labels(N, classes=V),
            lambda z, y, z_loss_weight: compiled(z, y, torch.tensor(z_loss_weight)),
            z_loss_weight=w,
        )
    assert counter.frame_count == 1


def test_trap_17_a_changing_num_label_tokens() -> None:
    compiled, counter = counted(lambda z, y, n: cross_entropy(z, y, num_label_tokens=n, reduction="sum"))
    for n in (5, 6, 7, 11, 13):
        check(
            logits(N, V),
            labels(N, classes=V),
            lambda z, y, num_label_tokens, reduction: compiled(z, y, num_label_tokens),
            num_label_tokens=n,
            reduction="sum",
        )
    assert counter.frame_count <= 2


def test_eight_lengths() -> None:
    compiled, counter = counted(lambda z, y: cross_entropy(z, y, label_smoothing=0.1, z_loss_weight=0.1))
    for n in (12, 17, 5, 31, 8, 23, 2, 29):
        check(
            logits(2, n, V),
            labels(2, n, classes=V),
            lambda z, y, **_: compiled(z, y),
            label_smoothing=0.1,
            z_loss_weight=0.1,
        )
    assert counter.frame_count <= 2


# Eager calls where there is a GPU run compiled code. A CPU stands in for one here.


@pytest.fixture
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(functional, "COMPILED_ON", ("cpu",))
    functional._compiled.cache_clear()
    yield
    functional._compiled.cache_clear()


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("cpu_as_gpu")
def test_eager_calls_run_compiled_code() -> None:
    def check_length(n: int, w: float) -> None:
        check(
            logits(n, V, dtype=torch.bfloat16),
            labels(n, classes=V),
            z_loss_weight=w,
            num_label_tokens=n + 1,
            label_smoothing=0.1,
        )

    with without_codegen():  # a length that is known is that of test_compiled_equals_float64
        check_length(12, 1e-3)
    for n, w in ((17, 2e-3), (5, 0.0), (31, 0.5), (8, 0.25)):
        check_length(n, w)
    with without_codegen():
        check_length(1, 0.1)
    assert 1 <= compilations() <= 3  # a length, any length, the length 1


@pytest.mark.usefixtures("cpu_as_gpu")
def test_eager_calls_have_no_limit_of_variants() -> None:
    limit = 2
    reductions = ["none", "mean", "sum"]
    every, few = itertools.product(FLOATS, reductions), zip(FLOATS, itertools.cycle(reductions))
    variants = list(every if EVERYTHING else few)
    with torch._dynamo.config.patch(recompile_limit=limit), without_codegen():
        for dtype, reduction in variants:
            check(logits(N, V, dtype=dtype), labels(N, classes=V), reduction=reduction)
        assert compilations() == len(variants) > limit
        assert torch._dynamo.config.recompile_limit == limit


def test_inside_a_users_compiled_code_nothing_is_compiled_apart(cpu_as_gpu: None) -> None:
    compiled, counter = counted(cross_entropy)
    compiled(logits(N, V), labels(N, classes=V))
    assert counter.frame_count == compilations() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    z, y, options = logits(N, V, dtype=dtype), labels(N, classes=V), made(OPTIONS["all"])
    outside = bits(z, y, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(bits(z, y, **options), outside)


# On a GPU


def on_gpu(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """f on a GPU, for arguments and results that are here."""

    def run(z: Tensor, target: Tensor, **options: Any) -> Tensor:
        there = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
        return f(z.cuda(), target.cuda(), **there).cpu()

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gpu_eager_equals_float64(options: dict[str, Any], soft: bool, dtype: torch.dtype) -> None:
    target = probabilities() if soft else labels(N, classes=V)
    check(logits(N, V, dtype=dtype), target, on_gpu(cross_entropy), **made(options))


@pytest.mark.gpu
def test_gpu_eager_with_several_vocabularies_and_lengths() -> None:
    for n, v in ((12, 50257), (7, 50257), (31, 32000), (5, 32000), (2, 101), (9, 101)):
        check(logits(n, v), labels(n, classes=v), on_gpu(cross_entropy), label_smoothing=0.1)


@pytest.mark.gpu
def test_gpu_eager_makes_no_copy_of_the_logits() -> None:
    z = torch.randn(2048, 50257, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = torch.randint(0, 50257, (2048,), device="cuda")
    for _ in range(2):
        z.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        cross_entropy(z, y, softcap=30.0, label_smoothing=0.1, z_loss_weight=1e-4).backward()
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * z.nbytes


@pytest.mark.gpu
def test_trap_24_gpu_eager_waits_for_nothing() -> None:
    z = torch.randn(64, 1000, device="cuda", requires_grad=True)
    y, w = torch.randint(0, 1000, (64,), device="cuda"), torch.rand(1000, device="cuda")

    def step(i: int) -> None:
        given = {"z_loss_weight": 1e-4 * i, "num_label_tokens": 60 + i, "weight": w}
        cross_entropy(z, y, label_smoothing=0.1, **given).backward()

    for i in range(3):
        step(i)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(3, 6):
            step(i)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_trap_24_gpu_graphs() -> None:
    compiled = torch.compile(cross_entropy, mode="reduce-overhead", fullgraph=True)
    y = labels(N, classes=V)
    for w in (0.1, 0.2, 0.0, 0.3):

        def f(z: Tensor, y: Tensor, z_loss_weight: float) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(z, y, z_loss_weight=torch.tensor(z_loss_weight, device="cuda")).clone()

        check(logits(N, V), y, on_gpu(f), z_loss_weight=w)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", BAD)
def test_gpu_bad_tensors_make_the_loss_nan(bad: float) -> None:
    z, y = Z.cuda(), Y.cuda()
    assert cross_entropy(z, y, weight=torch.tensor([1.0, bad, 1.0], device="cuda")).isnan()
    assert cross_entropy(z, y, z_loss_weight=torch.tensor(bad, device="cuda")).isnan()
    with pytest.raises(InputError, match="z_loss_weight must not be negative, NaN or infinite"):
        cross_entropy(z, y, z_loss_weight=bad)


@pytest.mark.gpu
def test_trap_26_gpu_a_label_outside_makes_its_row_nan() -> None:
    z, y = logits(N, V).cuda(), torch.arange(N).cuda()
    y[4] = V
    ours = bits(z, y, reduction="none", weight=class_weights().cuda(), label_smoothing=0.1)
    for rows in (ours.value, ours.gradient.sum(-1)):
        assert rows.isnan().tolist() == [i == 4 for i in range(N)]
