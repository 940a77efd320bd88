"""The templates as they are generated, run by Triton's interpreter against float64.

The kernels come out of Inductor whole (tests/gpu_codegen.py), so what is run here is what a GPU is given,
with any chain that was fused into it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import kernel_reference as reference
import pytest
import torch
from gpu_codegen import Wrapper, generate, interpret
from interpreter import triton_ir
from pairwise import EVERYTHING, covering, in_turns
from torch import Tensor

from inductor_ce import ops
from inductor_ce.ops import lowering
from inductor_ce.ops.gemm import aligned_strides

N = 3
VOCABULARIES = [1, 2, 7, 128, 257, 1000, 4096, 4097, 5000, 20000]
RAGGED = [2, 7, 130, 1000, 4097, 9000]
RELATIVE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6, torch.float64: 1e-13}
MINUS_INFINITY = -torch.inf


@pytest.fixture(autouse=True)
def registered() -> None:
    lowering.register()


def labels_for(v: int, n_labels: int) -> list[Tensor]:
    """Label tensors of alternating dtype, with all the edges in their rows."""
    dtypes = (torch.int64, torch.int32)
    edges = [[0, v - 1, -100], [v + 5, v // 2, v - 1]]
    return [torch.tensor(edges[j], dtype=dtypes[j]) for j in range(n_labels)]


def weights_for(v: int, n_weights: int) -> list[Tensor]:
    """A weight of columns, and one of rows and columns."""
    return [torch.randn(v), torch.randn(N, v).bfloat16()][:n_weights]


def logits(v: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(N, v)).to(dtype)


Chain = Callable[[Tensor], Tensor]


def no_chain(z: Tensor) -> Tensor:
    return z


class Like(NamedTuple):
    """All of a tensor that its kernels are made for."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensors: list[Tensor]) -> tuple[Like, ...]:
        return tuple(cls(t.shape, t.stride(), t.dtype) for t in tensors)

    def meta(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


@functools.cache
def stats_kernel(
    inputs: tuple[Like, ...], n_labels: int, which: str, configuration: int, chain: Chain
) -> Wrapper:
    """The code of row_stats, made once for all tests of the same rows, sizes, dtypes and chain."""

    def f(z: Tensor, *rest: Tensor) -> Tensor:
        return ops.row_stats(chain(z), list(rest[:n_labels]), list(rest[n_labels:]), which)

    (wrapper,) = generate(f, *(like.meta() for like in inputs), configuration=configuration)
    return wrapper


@functools.cache
def grad_kernel(
    inputs: tuple[Like, ...], n_labels: int, which: str, configuration: int, chain: Chain
) -> Wrapper:
    """The same of row_grad."""

    def f(z: Tensor, m: Tensor, c: Tensor, *rest: Tensor) -> Tensor:
        return ops.row_grad(chain(z), list(rest[:n_labels]), list(rest[n_labels:]), m, c, which)

    (wrapper,) = generate(f, *(like.meta() for like in inputs), configuration=configuration)
    return wrapper


def run_stats(
    z: Tensor,
    labels: list[Tensor],
    weights: list[Tensor],
    which: str,
    configuration: int = 0,
    chain: Chain = no_chain,
) -> Tensor:
    inputs = [z, *labels, *weights]
    wrapper = stats_kernel(Like.of(inputs), len(labels), which, configuration, chain)
    out = torch.full((which.count(",") + 1, len(z)), torch.nan, dtype=ops.stats_dtype(z))
    interpret(wrapper, inputs, out)
    return out


def run_grad(
    z: Tensor,
    labels: list[Tensor],
    weights: list[Tensor],
    m: Tensor,
    coefficients: Tensor,
    which: str,
    configuration: int = 0,
    chain: Chain = no_chain,
) -> Tensor:
    inputs = [z, m, coefficients, *labels, *weights]
    wrapper = grad_kernel(Like.of(inputs), len(labels), which, configuration, chain)
    out = torch.full(z.shape, torch.nan, dtype=z.dtype)
    interpret(wrapper, inputs, out)
    return out


def assert_stats(actual: Tensor, z: Tensor, labels: list[Tensor], weights: list[Tensor], which: str) -> None:
    expected = reference.stats(z, labels, weights, which)
    rtol = 1e-12 if z.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=rtol * 100, equal_nan=True)


def check_stats(
    z: Tensor, labels: list[Tensor], weights: list[Tensor], which: str, configuration: int = 0
) -> None:
    assert_stats(run_stats(z, labels, weights, which, configuration), z, labels, weights, which)


def check_grad(
    z: Tensor, labels: list[Tensor], weights: list[Tensor], which: str, configuration: int = 0
) -> None:
    acc = ops.stats_dtype(z)
    m, coefficients = z.to(acc).amax(1), torch.randn(which.count(",") + 1, N, dtype=acc)
    actual = run_grad(z, labels, weights, m, coefficients, which, configuration)
    expected = reference.grad(z, labels, weights, m, coefficients, which)
    tolerance = RELATIVE[z.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


PLAIN = reference.rows(1, "sum")
EVERY = reference.every_row(1, 2)
PLAIN_ROWS, EVERY_ROWS = ops.Rows.decode(PLAIN, 1), ops.Rows.decode(EVERY, 1, 2)


def configured(sizes: list[int], kinds: Callable[[int], list[dict[str, Any]]]) -> list[tuple[int, int]]:
    """(configuration, V), of those that differ at that V: each of both once, or with ALL=1 every pair."""
    both = [(i, v) for v in sizes for i in range(len(kinds(v)))]
    return both if EVERYTHING else covering(both, strength=1)


def stats_of(rows: ops.Rows) -> Callable[[int], list[dict[str, Any]]]:
    return lambda v: lowering.stats_configurations(v, torch.float32, rows)


def grad_of(rows: ops.Rows) -> Callable[[int], list[dict[str, Any]]]:
    return lambda v: lowering.grad_configurations(v, torch.float32, rows)


def with_more_in_memory(z: Tensor) -> Tensor:
    """Rows as `logits` makes them on a GPU. What is beyond V is anything, as numbers that would be seen."""
    n, v = z.shape
    row, _ = aligned_strides(v, torch.device("cuda"))
    return z.new_full((n, row), 1e4).narrow(1, 0, v).copy_(z)


@pytest.mark.parametrize("v", [255, 256, 600, 4099, 9000])
def test_gradient_over_the_logits(v: int) -> None:
    """Rows that `logits` made are written to their end, where they begin at multiples of eight."""
    h, w = torch.randn(N, 8, dtype=torch.bfloat16), torch.randn(8, v, dtype=torch.bfloat16)
    (y,), (m, *c) = labels_for(v, 1), torch.randn(5, N)

    def f(h: Tensor, w: Tensor, m: Tensor, c: Tensor, y: Tensor) -> Tensor:
        z = torch.ops.inductor_ce.logits(h, w, None, [])
        return ops.row_grad(z, [y], [], m, c, PLAIN) @ w.t()

    inputs = [h, w, m, torch.stack(c), y]
    (wrapper,) = generate(f, *(like.meta() for like in Like.of(inputs)))
    assert wrapper.allocations_of("bfloat16") == [(N, 8)], "the gradient has memory of its own"
    z = h @ w
    expected = run_grad(z, [y], [], m, torch.stack(c), PLAIN)
    z = with_more_in_memory(z)
    interpret(wrapper, inputs, z)
    assert f"W : tl.constexpr = {z.stride(0)}\n" in wrapper.text
    assert torch.equal(z, expected)


@pytest.mark.parametrize(("configuration", "v"), configured(VOCABULARIES, stats_of(PLAIN_ROWS)))
def test_stats_at_every_vocabulary(configuration: int, v: int) -> None:
    check_stats(logits(v), labels_for(v, 1), [], PLAIN, configuration)


@pytest.mark.parametrize(("configuration", "v"), configured(VOCABULARIES, grad_of(PLAIN_ROWS)))
def test_grad_at_every_vocabulary(configuration: int, v: int) -> None:
    check_grad(logits(v), labels_for(v, 1), [], PLAIN, configuration)


@pytest.mark.parametrize(("configuration", "v"), configured(RAGGED, stats_of(EVERY_ROWS)))
def test_every_row_at_ragged_vocabularies(configuration: int, v: int) -> None:
    check_stats(logits(v), labels_for(v, 1), weights_for(v, 2), EVERY, configuration)


@pytest.mark.parametrize(("configuration", "v"), configured(RAGGED, grad_of(EVERY_ROWS)))
def test_gradient_of_every_row_at_ragged_vocabularies(configuration: int, v: int) -> None:
    check_grad(logits(v), labels_for(v, 1), weights_for(v, 2), EVERY, configuration)


@pytest.mark.in_turns
@pytest.mark.parametrize("n_weights", [2, 0])
@pytest.mark.parametrize("dtype", RELATIVE)
def test_every_dtype(dtype: torch.dtype, n_weights: int) -> None:
    z, labels, weights = logits(257, dtype), labels_for(257, 2), weights_for(257, n_weights)
    which = reference.every_row(2, 2) if n_weights else reference.rows(2, "sum")
    check_stats(z, labels, weights, which)
    check_grad(z, labels, weights, which)


@pytest.mark.in_turns
@pytest.mark.parametrize("others", [[], ["sum"]])
@pytest.mark.parametrize("n_labels", [0, 1, 2])
def test_every_set_of_rows(n_labels: int, others: list[str]) -> None:
    z, labels, which = logits(300), labels_for(300, n_labels), reference.rows(n_labels, *others)
    check_stats(z, labels, [], which)
    check_grad(z, labels, [], which)


@pytest.mark.in_turns
@pytest.mark.parametrize("n_labels", [0, 1])
@pytest.mark.parametrize(
    "others",
    [
        ["sumexpz"],
        ["argmax"],
        ["sum", "argmax"],
        ["dot:0"],
        ["mass:0"],
        ["expdot:0"],
        ["dot:0", "mass:0"],
        ["sumexpz", "mass:0", "dot:1", "expdot:1"],
        ["expdot:0", "mass:1"],
        ["keptdot:0", "keptmass:0"],
        ["keptdot:0"],
        ["mass:0", "seendot:1"],
        ["mass:0", "expdot:0", "expzdot:0", "keptexpdot:1"],
        list(reference.kept(2)),
    ],
    ids=",".join,
)
def test_some_of_the_rows(n_labels: int, others: list[str]) -> None:
    n_weights = len({row.split(":")[1] for row in others if ":" in row})
    z, labels, which = logits(300), labels_for(300, n_labels), reference.rows(n_labels, *others)
    check_stats(z, labels, weights_for(300, n_weights), which)
    check_grad(z, labels, weights_for(300, n_weights), which)


WEIGHTS: dict[str, Callable[[int], Tensor]] = {
    "float64": lambda v: torch.randn(N, v).double(),
    "float16": lambda v: torch.randn(N, v).half(),
    "bool": lambda v: torch.randn(N, v) > 0,
    "int64": lambda v: torch.randint(-9, 9, (N, v)),
    "uint8": lambda v: torch.randint(0, 256, (N, v)).byte(),
    "of columns, bool": lambda v: torch.randn(v) > 0,
    "of columns, strided": lambda v: torch.randn(2 * v)[::2],
    "transposed": lambda v: torch.randn(v, N).t(),
    "every other column": lambda v: torch.randn(N, 2 * v)[:, ::2],
    "expanded over rows": lambda v: torch.randn(1, v).expand(N, v),
    "expanded over columns": lambda v: torch.randn(N, 1).expand(N, v),
}


@pytest.mark.parametrize("kinds", [[kind] for kind in WEIGHTS] if EVERYTHING else [[*WEIGHTS]])
def test_weights_of_any_kind(kinds: list[str]) -> None:
    weights = [WEIGHTS[kind](300) for kind in kinds]
    z, which = logits(300), reference.rows(0, *reference.weighted(len(weights)))
    check_stats(z, [], weights, which)
    check_grad(z, [], weights, which)


PLACES = [0, 4500, 9000, 18999]  # in the first tile, in others, and in what is left over


def with_one_finite_column() -> Tensor:
    """A row for each of the places, and one that has none."""
    z = torch.full((len(PLACES) + 1, 19000), MINUS_INFINITY)
    z[range(len(PLACES)), PLACES] = torch.tensor([1.0, -2.0, 3.0, 0.5])
    return z


def test_one_finite_column() -> None:
    actual = run_stats(with_one_finite_column(), [], [], "max,sumexp")
    assert actual.tolist() == [[1.0, -2.0, 3.0, 0.5, MINUS_INFINITY], [1.0, 1.0, 1.0, 1.0, 0.0]]


def test_every_row_of_one_finite_column() -> None:
    z, q = with_one_finite_column(), torch.randint(1, 9, (19000,)).float()
    actual = run_stats(z, [], [q], reference.rows(0, "sum", "sumexpz", "argmax", *reference.weighted(1)))
    assert actual[2].tolist() == actual[5].tolist() == [MINUS_INFINITY] * len(z)
    assert actual[[3, 4]].tolist() == [[0.0] * len(z), [*map(float, PLACES), 0.0]]
    assert actual[[6, 7]].tolist() == [[q.sum().item()] * len(z), [*q[PLACES].tolist(), 0.0]]


def test_not_finite() -> None:
    """A row for each value at each place, and one without."""
    values, z = [torch.nan, torch.inf], (3 * torch.randn(7, 19000))
    for row, (value, column) in enumerate(product(values, [0, 9000, 18999])):
        z[row, column] = value
    actual = run_stats(z, [], [], "max,sumexp")
    assert actual[1].isnan().tolist() == [*[True] * 6, False]
    assert_stats(actual[:, -1:], z[-1:], [], [], "max,sumexp")


@pytest.mark.in_turns
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("columns", [[0], [9000, 11000], [18999], [17000, 18999, 5]], ids=str)
def test_every_row_of_what_is_not_finite(value: float, columns: list[int]) -> None:
    """In the last row, after which there is nothing to read."""
    z, weights, which = logits(19000), weights_for(19000, 1), reference.every_row(0, 1)
    z[-1, columns] = value
    actual, expected = run_stats(z, [], weights, which), reference.stats(z, [], weights, which)
    assert_stats(actual[:, :-1], z[:-1], [], weights, which)
    assert torch.equal(actual[1:, -1].isnan(), expected[1:, -1].isnan())
    assert actual[which.split(",").index("argmax"), -1] == min(columns)


@pytest.mark.in_turns
@pytest.mark.parametrize("v", [130, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_of_ties_is_the_first(v: int, dtype: torch.dtype) -> None:
    """The same maximum in lanes and tiles before and after, and a row that is all ties."""
    z = logits(v, dtype).clamp(max=3)
    z[0, [v // 3, v // 3 + 1, v - 1]] = 20
    z[1, [v - 1, v - 2]] = 20
    z[2] = 0.5
    actual = run_stats(z, [], [], "max,sumexp,argmax")[2]
    assert actual.tolist() == [v // 3, v - 2, 0]


def test_nan_is_sought_in_the_logits_after_a_chain() -> None:
    z = logits(9000).abs()
    z[0, [7000, 8999]] = torch.nan
    z[1, 5000] = -1
    actual = run_stats(z, [], [], "max,sumexp,argmax", chain=lambda z: z.sqrt())[2]
    assert actual.tolist() == [7000, 5000, z[2].argmax()]


@pytest.mark.parametrize("v", [7, 9000])
def test_gradient_of_a_logit_of_minus_infinity(v: int) -> None:
    """It gets that of its label and weights alone."""
    z, weights, which = logits(v), weights_for(v, 2), EVERY
    z[:, [0, v // 2, v - 1]] = MINUS_INFINITY
    check_grad(z, labels_for(v, 1), weights, which)


def test_ignored_rows_are_written() -> None:
    z, labels = logits(5000), [torch.full((N,), -100)]
    z[1, 17] = torch.nan
    dz = run_grad(z, labels, [], logits(1)[:, 0], torch.zeros(3, N), "max,sumexp,pick")
    assert dz[::2].eq(0).all()
    assert dz[1].isnan().sum() == 1


def test_coefficients_that_are_not_read() -> None:
    z, weights, coefficients = logits(300), weights_for(300, 2), torch.randn(12, N)
    coefficients[[row.startswith(("max", "argmax", "mass")) for row in EVERY.split(",")]] = torch.nan
    assert run_grad(z, labels_for(300, 1), weights, z.amax(1), coefficients, EVERY).isfinite().all()


def test_strided_inputs() -> None:
    z, y = logits(5000)[:, 1:4098], torch.arange(2 * N)[::2]
    check_stats(z, [y], [], PLAIN)
    m, coefficients = logits(2)[:, 1] + 5, torch.randn(N, 4).t()
    actual = run_grad(z, [y], [], m, coefficients, PLAIN)
    expected = reference.grad(z, [y], [], m, coefficients, PLAIN)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.in_turns
@pytest.mark.parametrize("n_weights", [0, 2])
@pytest.mark.parametrize("v", [257, 8192, 20000])
def test_fused_chain(v: int, n_weights: int) -> None:
    z, labels, weights = logits(v), labels_for(v, 2), weights_for(v, n_weights)
    which = reference.every_row(2, 2) if n_weights else reference.rows(2, "sum")
    chained = 5 - 1.7 * z
    assert_stats(
        run_stats(z, labels, weights, which, chain=lambda z: 5 - 1.7 * z), chained, labels, weights, which
    )
    m, coefficients = chained.amax(1), torch.randn(which.count(",") + 1, N)
    actual = run_grad(z, labels, weights, m, coefficients, which, chain=lambda z: 5 - 1.7 * z)
    expected = reference.grad(chained, labels, weights, m, coefficients, which)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def some_rows(z: Tensor, y: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
    return reference.loss(z, y, weight)


def every_row(z: Tensor, *others: Tensor) -> Tensor:
    return reference.loss_of_every_row(z, *others)


def every_row_soft_capped(z: Tensor, *others: Tensor) -> Tensor:
    return every_row(30 * torch.tanh(z.float() / 30), *others)


LOSSES = [some_rows, every_row_soft_capped, every_row]


@pytest.mark.parametrize(("v", "loss"), in_turns([1, 50257, 65536, 128256], LOSSES))
def test_triton_accepts_them(v: int, loss: Callable[..., Tensor]) -> None:
    y = torch.empty(N, dtype=torch.int64, device="meta")
    z = torch.empty(N, v, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight, cost = torch.empty(N, device="meta"), torch.empty(v, device="meta")
    q = torch.empty(N, v, dtype=torch.bfloat16, device="meta")
    for wrapper in generate(loss, z, y, weight, q, cost, prepare_joint=reference.recompute_chain):
        accept(wrapper)


def accept(wrapper: Wrapper) -> None:
    ((name, source),) = (item for item in wrapper.kernels.items() if item[0].startswith("triton_tem"))
    assert triton_ir(source, name, wrapper.signature(name))
