"""The lowerings: compiled CPU code against float64, and the code that a GPU would get."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from typing import Any

import kernel_reference as reference
import pytest
import torch
from gpu_codegen import generate
from interpreter import triton_ir
from kernels import backwards_at_once
from pairwise import EVERYTHING, in_turns
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from inductor_ce import Options, ops
from inductor_ce.common import failsafe
from inductor_ce.common.compat import inductor, templates
from inductor_ce.heads.fuse import fuse_heads
from inductor_ce.ops import lowering
from inductor_ce.ops.counted import HOST_COPY

N, V = 8192, 32000
EVERY = reference.every_row(2, 2)


@pytest.fixture(autouse=True)
def registered() -> None:
    lowering.register()


def loss(z: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return reference.loss(z, y, weight)


# On the CPU: Inductor's own loops


Arguments = tuple[Tensor, ...]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-12}


def gradient(value: Tensor, arguments: Arguments) -> tuple[Tensor, Tensor]:
    return value, torch.autograd.grad(value, arguments[0], retain_graph=True)[0]


def exactly(f: Callable[..., Tensor], arguments: Arguments) -> tuple[Tensor, Tensor]:
    z, y, *others = arguments
    zd = z.detach().double().requires_grad_()
    return gradient(f(zd, y, *(a.double() for a in others)), (zd,))


DTYPES = [(torch.bfloat16, torch.float64), (torch.float32, torch.float16)]  # of some rows, of every row


@pytest.mark.parametrize(("of_some", "of_every"), product(TOLERANCE, repeat=2) if EVERYTHING else DTYPES)
def test_loss_and_gradient(of_some: torch.dtype, of_every: torch.dtype) -> None:
    """Of some rows and of every row, in one graph; nothing falls back on the operators."""

    def given(dtype: torch.dtype, v: int, *others: Tensor) -> Arguments:
        z = (3 * torch.randn(7, v)).to(dtype).requires_grad_()
        return z, reference.random_labels(7, v, torch.int32), torch.rand(7), *others

    def both(few: Arguments, many: Arguments) -> tuple[Tensor, Tensor]:
        return loss(*few), reference.loss_of_every_row(*many)

    few, many = given(of_some, 37), given(of_every, 130, *reference.random_weights(7, 130))

    def step() -> list[tuple[Tensor, Tensor]]:
        values = torch.compile(both)(few, many)
        return list(zip(values, torch.autograd.grad(values, (few[0], many[0])), strict=True))

    with backwards_at_once():
        actual, codes = run_and_get_code(step)
    assert len(codes) == 2
    assert not any("torch.ops.inductor_ce" in code for code in codes)
    references = reference.loss_reference, reference.loss_of_every_row_reference
    expected = list(map(exactly, references, (few, many)))
    for (value, dz), (exact_value, exact_dz) in zip(actual, expected, strict=True):
        rtol = TOLERANCE[dz.dtype]
        torch.testing.assert_close(value.double(), exact_value, rtol=min(rtol, 1e-5), atol=0)
        torch.testing.assert_close(dz.double(), exact_dz, rtol=rtol, atol=rtol * exact_dz.abs().max().item())


def all_rows(z: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
    return ops.row_stats(z, [y, y], [*weights], EVERY)


def test_row_count_is_dynamic() -> None:
    compiled = torch.compile(all_rows, dynamic=True)
    for n in (5, 7, 1, 0):
        z, y, q = torch.randn(n, 9), reference.random_labels(n, 9), [torch.randn(n, 9), torch.rand(9)]
        expected = reference.stats(z, [y, y], q, EVERY).float()
        torch.testing.assert_close(compiled(z, y, *q), expected)


def test_no_columns() -> None:
    z, y, q = torch.empty(3, 0), torch.zeros(3, dtype=torch.int64), [torch.empty(0), torch.empty(3, 0)]
    assert torch.equal(torch.compile(all_rows)(z, y, *q), all_rows(z, y, *q))


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "bfloat16": lambda: torch.randn(6, 11).bfloat16(),
    "bool, of columns": lambda: torch.randn(11) > 0,
    "int64, transposed": lambda: torch.randint(-9, 9, (11, 6)).t(),
    "expanded over columns": lambda: torch.randn(6, 1).expand(6, 11),
    "strided, of columns": lambda: torch.randn(22)[::2],
}


def test_weights_of_any_kind() -> None:
    which = reference.rows(1, *reference.weighted(1))
    z, y = torch.randn(6, 11), reference.random_labels(6, 11)
    m, c = z.amax(1), torch.randn(6, 6)
    weights = {kind: make() for kind, make in WEIGHTS.items()}

    @torch.compile
    def of_each_kind(weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            kind: (ops.row_stats(z, [y], [q], which), ops.row_grad(z, [y], [q], m, c, which))
            for kind, q in weights.items()
        }

    for kind, (stats, dz) in of_each_kind(weights).items():
        q = [weights[kind]]
        torch.testing.assert_close(stats, reference.stats(z, [y], q, which).float(), msg=in_case(kind))
        torch.testing.assert_close(dz, reference.grad(z, [y], q, m, c, which).float(), msg=in_case(kind))


def in_case(name: object) -> Callable[[str], str]:
    return lambda told: f"{name}: {told}"


def test_not_finite() -> None:
    """By the code of `test_row_count_is_dynamic`, which is compiled once."""
    y, q = reference.random_labels(5, 9), [torch.randn(5, 9), torch.rand(9)]
    compiled = torch.compile(all_rows, dynamic=True)
    for value in (-torch.inf, torch.inf, torch.nan):
        z = torch.randn(5, 9)
        z[1, 3], z[2] = value, value
        expected = all_rows(z, y, *q)
        torch.testing.assert_close(compiled(z, y, *q), expected, equal_nan=True, msg=in_case(value))


def test_argmax_is_the_first_of_the_largest() -> None:
    """Among ties; and NaN is the largest, in the vectors of a loop as in its tail."""

    def given(v: int) -> Tensor:
        z = torch.randn(5, v).clamp(max=1)
        z[0, [1, v - 1]], z[1] = 3, 0
        z[2, [2, v - 1]], z[3], z[4, v - 1] = torch.nan, -torch.inf, torch.inf
        z[2, 0] = torch.inf
        return z

    sizes = (4, 67)
    compiled = torch.compile(lambda *zs: [ops.row_stats(z, [], [], "max,sumexp,argmax")[2] for z in zs])
    for v, actual in zip(sizes, compiled(*map(given, sizes)), strict=True):
        assert actual.tolist() == [1, 0, 2, 0, v - 1]


@pytest.mark.parametrize("is_returned", [False, True])
def test_argmax_of_what_is_rounded(is_returned: bool) -> None:
    """A loop that makes 16-bit logits and takes their maximum would have it of what they were before."""
    a, w = 3 * torch.randn(21, 67).bfloat16(), 1 + torch.randn(67).bfloat16() / 9

    def of(a: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        z = a * w
        m, _, place = ops.row_stats(z, [], [], "max,sumexp,argmax")
        return (m, place, z) if is_returned else (m, place)

    z = a * w
    expected = z.amax(1), z.argmax(1)
    for actual, row in zip(torch.compile(of)(a, w), expected, strict=False):
        assert actual.tolist() == row.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_label_of_the_largest_has_the_maximum(dtype: torch.dtype) -> None:
    """To the last bit, behind functions that a vector has otherwise than a number."""
    a = 9 * torch.randn(9000, 67).to(dtype)
    y = a.argmax(1)

    @torch.compile
    def of(a: Tensor, y: Tensor) -> Tensor:
        m, _, pick = ops.row_stats(torch.tanh(a / 30) * 30, [y], [], "max,sumexp,pick")
        return m == pick

    assert of(a, y).all()


LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "in memory": lambda a, b: a,
    "transposed in memory": lambda a, b: b.t(),
    "of functions": lambda a, b: torch.tanh(a / 3) + torch.exp(b.t()),
    "16-bit, of both": lambda a, b: a.bfloat16() + b.t().bfloat16(),
    "float64": lambda a, b: a.double() + b.t(),
    **({"of both": lambda a, b: a + b.t()} if EVERYTHING else {}),
}


def test_argmax_beside_what_is_read_across_rows() -> None:
    """Such a loop goes over tiles: the logits, a weight, or what a program itself sums beside them."""
    kinds = in_turns([*LOGITS], [1, 0])  # of weights as well: those in memory with the one that is not
    which, n, v = reference.rows(0, "argmax", *reference.weighted(1)), 21, 45

    @torch.compile
    def of_each_kind(a: Tensor, b: Tensor, *weights: Tensor) -> list[tuple[Tensor, ...]]:
        made = [(LOGITS[kind](a, b), weights[i]) for kind, i in kinds]
        return [(z, (z * q).sum(1), ops.row_stats(z, [], [q], which)) for z, q in made]

    a, b = 3 * torch.randn(n, v), 3 * torch.randn(v, n)
    a[:2], b[:, :2] = 1.0, 0.5  # all of them the largest
    a[2, [3, 6]], b[[3, 6], 2], a[3], b[:, 3] = torch.nan, torch.nan, -torch.inf, -torch.inf
    weights = torch.randn(n, v), torch.randint(-9, 9, (v, n)).t()
    place = which.split(",").index("argmax")
    for kind, (z, _, stats) in zip(kinds, of_each_kind(a, b, *weights), strict=True):
        assert stats[place].tolist() == z.argmax(1).tolist(), kind


def test_coefficients_of_any_strides() -> None:
    """Of logits some of which are minus infinity."""
    n, v = 6, 11
    z, y, q = torch.randn(n, v), reference.random_labels(n, v), [torch.randn(n, v), torch.rand(v)]
    z[:, [0, v - 1]] = -torch.inf
    m, rows = z.amax(1), EVERY.count(",") + 1
    strided = {"transposed": torch.randn(n, rows).t(), "expanded": torch.randn(rows, 1).expand(rows, n)}
    compiled = torch.compile(lambda *cs: [ops.row_grad(z, [y, y.flip(0)], q, m, c, EVERY) for c in cs])
    for (name, c), dz in zip(strided.items(), compiled(*strided.values()), strict=True):
        expected = reference.grad(z, [y, y.flip(0)], q, m, c, EVERY)
        torch.testing.assert_close(dz, expected.float(), msg=in_case(name))


# On a GPU: one template, nothing of size [N, V] but what is asked for


def gpu_weights(v: int = V) -> tuple[Tensor, Tensor]:
    return torch.empty(N, v, dtype=torch.bfloat16, device="meta"), torch.empty(v, device="meta")


def gpu_arguments(v: int = V, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(N, v, dtype=dtype, device="meta", requires_grad=True),
        torch.empty(N, dtype=torch.int64, device="meta"),
        torch.empty(N, device="meta"),
    )


@pytest.mark.parametrize(("chain", "every", "v"), in_turns([*reference.CHAINS], [False, True], [V, 32768]))
def test_chain_is_absorbed(chain: Callable[[Tensor, Tensor], Tensor], every: bool, v: int) -> None:
    """At a multiple of the tile too. No weight is copied, not even one of columns to [N, V]."""
    loss_of = reference.loss_of_every_row if every else reference.loss
    forward, backward = generate(
        lambda x, y, weight, bias, *weights: loss_of(chain(x, bias), y, weight, *weights),
        *gpu_arguments(v),
        torch.empty(v, device="meta"),
        *(gpu_weights(v) if every else ()),
        prepare_joint=reference.recompute_chain,
    )
    for wrapper in (forward, backward):
        assert sum(name.startswith("triton_tem") for name in wrapper.launches) == 1
        assert "extern_kernels" not in "\n".join(wrapper.kernels)
    assert (N, v) not in forward.allocations
    assert backward.allocations.count((N, v)) == 1


def test_a_chain_in_two_loops_is_absorbed() -> None:
    """As Inductor has one of many inputs. What the first leaves to the second has no memory to be freed."""

    def chain(x: Tensor, *rows: Tensor) -> Tensor:
        wide = x.float()
        for row in rows:
            wide = wide + row[:, None]
        return torch.where(wide > 0.5, wide, -wide)

    forward, _ = generate(
        lambda x, y, weight, *rows: reference.loss(chain(x, *rows), y, weight),
        *gpu_arguments(),
        *(torch.empty(N, device="meta") for _ in range(6)),
        prepare_joint=reference.recompute_chain,
    )
    assert (N, V) not in forward.allocations
    made = set(re.findall(r"(\w+) = ", forward.code))
    freed = re.findall(r"del (\w+)$", forward.code, re.MULTILINE)
    assert {name for name in freed if name.startswith("buf")} <= made


def test_weights_of_the_same_graph() -> None:
    """Soft targets are computed once, into memory, and kept for the backward."""
    forward, backward = generate(
        lambda z, y, weight, teacher, cost: reference.loss_of_every_row(
            z, y, weight, teacher.softmax(1), cost * 2
        ),
        *gpu_arguments(),
        *gpu_weights(),
    )
    assert forward.allocations.count((N, V)) == 1
    assert backward.allocations.count((N, V)) == 1
    for wrapper in (forward, backward):
        assert sum(name.startswith("triton_tem") for name in wrapper.launches) == 1


@pytest.mark.parametrize("others", [["argmax"], ["sumexpz"], reference.weighted(2)], ids=",".join)
def test_every_row_is_had_from_a_template(others: list[str], recwarn: pytest.WarningsRecorder) -> None:
    z, y, _ = gpu_arguments()
    which, weights = reference.rows(1, *others), gpu_weights() if ":" in others[0] else ()
    for wrapper in generate(lambda z, y, *q: ops.row_stats(z, [y], [*q], which), z, y, *weights):
        assert [name[:10] for name in wrapper.launches] == ["triton_tem"]
    assert not any("inductor_ce failed" in str(w.message) for w in recwarn)


def test_chain_is_computed_once_in_the_backward() -> None:
    _, backward = generate(
        lambda x, y, weight: reference.loss(reference.soft_cap(x, x), y, weight),
        *gpu_arguments(50257),
        prepare_joint=reference.recompute_chain,
    )
    name, source = next(item for item in backward.kernels.items() if item[0].startswith("triton_tem"))
    ttir = triton_ir(source, name, backward.signature(name))
    assert source.count("libdevice.tanh") == 2
    assert ttir.count("__nv_tanhf") == 1


@pytest.mark.skipif(
    not inductor.HAS_PASS_LISTS, reason="before 2.13 a view stands between template and epilogue"
)
def test_view_of_a_chain_is_absorbed() -> None:
    x = torch.empty(8, 1024, V, dtype=torch.bfloat16, device="meta", requires_grad=True)
    y, weight = (a.reshape(-1) for a in gpu_arguments()[1:])
    forward, backward = generate(
        lambda x, y, weight: reference.loss(reference.soft_cap(x, x).reshape(-1, V), y, weight),
        x,
        y,
        weight,
        prepare_joint=reference.recompute_chain,
    )
    assert sum(name.startswith("triton_tem") for name in forward.launches) == 1
    assert not [shape for shape in forward.allocations if V in shape]
    assert len([shape for shape in backward.allocations if V in shape]) == 1


@pytest.mark.parametrize("v", [V, 50257])
def test_plain_logits_are_read_once_a_graph(v: int) -> None:
    forward, backward = generate(loss, *gpu_arguments(v))
    assert forward.allocations[0] == (4, N)
    assert [shape for shape in backward.allocations if shape == (N, v)] == [(N, v)]
    assert not any("torch.ops.inductor_ce" in w.code for w in (forward, backward))


@pytest.mark.parametrize("every", [False, True] if EVERYTHING else [True])
def test_dynamic_rows_on_a_gpu(every: bool) -> None:
    def f(z: Tensor, y: Tensor, weight: Tensor, q: Tensor) -> Tensor:
        return reference.loss_of_every_row(z, y, weight, q, q[0]) if every else loss(z, y, weight)

    forward, backward = generate(f, *gpu_arguments(), gpu_weights()[0], dynamic=True)
    assert (-1, V) not in forward.allocations
    assert (-1, V) in backward.allocations


def test_empty_on_a_gpu() -> None:
    z, y = torch.empty(0, V, device="meta"), torch.empty(0, dtype=torch.int64, device="meta")
    (wrapper,) = generate(lambda z, y: ops.row_stats(z, [y], [], "max,sumexp,pick"), z, y)
    assert not any(name.startswith("triton_tem") for name in wrapper.launches)


def test_no_room_to_time_takes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Choice:
        def output_node(self) -> Choice:
            return self

    class Template:
        name = "any"

        def maybe_append_choice(self, choices: list[Choice], **kwargs: object) -> None:
            choices.append(Choice())

    def out_of_memory(name: str, choices: list[Choice], *args: object, **kwargs: object) -> None:
        seen.extend(choices)
        raise torch.OutOfMemoryError

    seen: list[Choice] = []
    monkeypatch.setattr(templates, "autotune_select_algorithm", out_of_memory)
    assert templates.choose(Template(), [], None, [], [{}, {}]) is seen[0]


# In place


def head_arguments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = torch.empty(512, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    w = torch.empty(V, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    return h, w, torch.empty(512, dtype=torch.int64, device="meta"), torch.empty(512, device="meta")


def head_loss(h: Tensor, w: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return loss(h @ w.t(), y, weight)


def head_loss_and_logits(h: Tensor, w: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    z = h @ w.t()
    return loss(z, y, weight), z


def head_loss_and_penalty(h: Tensor, w: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    z = h @ w.t()
    return loss(z, y, weight) + z.float().square().mean()


def both_in_one_graph(h: Tensor, w: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    z = h @ w.t()
    m = ops.row_stats(z, [y], [], "max,sumexp,pick")[0]
    return ops.row_grad(z, [y], [], m, weight.expand(3, -1), "max,sumexp,pick").t() @ h


def test_gradient_is_written_over_logits_that_die() -> None:
    forward, backward = generate(head_loss, *head_arguments())
    assert forward.allocations.count((512, V)) == 1
    assert (512, V) not in backward.allocations


def test_gradient_is_written_over_logits_of_the_same_graph() -> None:
    h, w, y, weight = (a.detach() for a in head_arguments())
    (wrapper,) = generate(both_in_one_graph, h, w, y, weight)
    assert wrapper.allocations.count((512, V)) == 1


def test_logits_that_somebody_else_reads_are_kept() -> None:
    _, backward = generate(head_loss_and_logits, *head_arguments())
    assert (512, V) in backward.allocations


def test_gradient_is_written_over_logits_by_the_loop_that_reads_them_last() -> None:
    _, backward = generate(head_loss_and_penalty, *head_arguments())
    assert not any(name.startswith("triton_tem") for name in backward.launches)
    assert (512, V) not in backward.allocations


def test_gradient_is_summed_with_anothers_in_one_loop() -> None:
    """Over what the other one's product has made: the sum takes no memory of its own."""

    def both(z: Tensor, y: Tensor, weight: Tensor, embedding: Tensor) -> Tensor:
        mean = z.float().softmax(-1).to(z.dtype) @ embedding
        return loss(z, y, weight) + mean.float().square().mean()

    embedding = torch.empty(V, 64, dtype=torch.bfloat16, device="meta")
    _, backward = generate(both, *gpu_arguments(), embedding)
    assert not any(name.startswith("triton_tem") for name in backward.launches)
    assert backward.allocations.count((N, V)) == 1


@pytest.mark.usefixtures("much")
def test_upstream_gradient_is_applied_in_place() -> None:
    """To 16-bit sums over chunks: the forward has made them, and nobody else reads them."""
    options = Options(strategy="token_chunks", memory_budget=0.26)
    forward, backward = generate(
        head_loss, *head_arguments(), prepare_joint=lambda graph: fuse_heads(graph, options), in_place=True
    )
    assert forward.code.count("ce_product_but(") == 4 == forward.code.count("ce_logits(")
    assert (128, V) not in forward.allocations
    assert backward.code.count("ce_times_in_place(") == 2
    assert not {(V, 64), (512, 64)} & set(backward.allocations)


def weighed_by(turned: bool, h: Tensor, w: Tensor, c: Tensor) -> Tensor:
    z = h @ w.t()
    q = z.t() if turned else c[0].unsqueeze(1).expand_as(z)
    m = ops.row_stats(z, [], [q], "max,sumexp,dot:0")[0]
    return ops.row_grad(z, [], [q], m, c, "max,sumexp,dot:0").t() @ h


@pytest.mark.parametrize("turned", [False, True])
def test_logits_that_are_weights_too_are_kept(turned: bool) -> None:
    """Another block may yet read, as weights, what one block writes."""
    h, w = head_arguments()[0].detach(), torch.empty(512, 64, dtype=torch.bfloat16, device="meta")
    (wrapper,) = generate(lambda *args: weighed_by(turned, *args), h, w, torch.empty(3, 512, device="meta"))
    assert wrapper.allocations.count((512, 512)) == 1 + turned


@pytest.mark.fails_inside
def test_template_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Inductor's loops take over, with a traceback in the log and one warning."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(templates, "choose", refuse)
    monkeypatch.setattr(failsafe, "_warned", False)
    x, y, weight = gpu_arguments()
    with pytest.warns(UserWarning, match="no such instruction"):
        forward, backward = generate(reference.loss, x, y, weight)
    assert not any(name.startswith("triton_tem") for name in forward.launches + backward.launches)
    assert "Traceback" in caplog.text


def late(nodes: list[Any], *_: Any, **__: Any) -> list[Any]:
    """The copy to the host, and what leads to it, as late as what nodes wait for allows."""
    (copy,) = (node for node in nodes if "host_copy" in str(getattr(node.node, "python_kernel_name", "")))
    others = [
        node for node in nodes if node is not copy and node.get_operation_names().isdisjoint(copy.ancestors)
    ]
    first = [node for node in others if copy.get_operation_names().isdisjoint(node.ancestors)]
    copied = [node for node in nodes if node not in others]
    return first + copied + [node for node in others if node not in first]


@pytest.mark.parametrize("is_first", [True, False])
def test_the_count_goes_to_the_host_before_the_body(is_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However Inductor orders what is left to it; what comes before in the graph stays before."""

    def f(x: Tensor, A: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        before = None if is_first else torch.mm(x, A)
        host = HOST_COPY((y != 0).sum(dtype=torch.int32).reshape(1))
        after = torch.mm(torch.tanh(x), A).relu()
        return host, after @ A if before is None else before + after

    monkeypatch.setattr("torch._inductor.memory.reorder_for_peak_memory", late)
    (wrapper,) = generate(f, torch.empty(64, 32), torch.empty(32, 32), torch.empty(64, dtype=torch.int64))
    called = re.findall(r"extern_kernels\.(\w+)\(", wrapper.code)
    copy = "inductor_ce_host_copy"
    assert called == ([copy, "mm", "mm"] if is_first else ["mm", copy, "mm"])
