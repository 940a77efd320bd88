"""The templates as they are generated, run by Triton's interpreter against float64.

The kernels come out of Inductor whole (tests/gpu_codegen.py), so what is run here is what a GPU is given,
with any chain that was fused into it.
"""

from __future__ import annotations

from collections.abc import Callable

import kernel_reference as reference
import pytest
import torch
from gpu_codegen import generate, interpret
from interpreter import triton_ir
from torch import Tensor

from inductor_ce import lowering, ops

N = 3
VOCABULARIES = [1, 2, 7, 128, 257, 1000, 4096, 4097, 5000, 20000]
RELATIVE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6, torch.float64: 1e-13}
MINUS_INFINITY = -torch.inf


@pytest.fixture(autouse=True)
def registered() -> None:
    lowering.register()


def rows(n_labels: int, with_sum: bool) -> str:
    return ",".join(["max", "sumexp"] + ["pick"] * n_labels + ["sum"] * with_sum)


def labels_for(v: int, n_labels: int) -> list[Tensor]:
    """Label tensors of alternating dtype, with all the edges in their rows."""
    dtypes = (torch.int64, torch.int32)
    edges = [[0, v - 1, -100], [v + 5, v // 2, v - 1]]
    return [torch.tensor(edges[j], dtype=dtypes[j]) for j in range(n_labels)]


def logits(v: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(N, v)).to(dtype)


def run_stats(
    z: Tensor,
    labels: list[Tensor],
    with_sum: bool,
    configuration: int = 0,
    chain: Callable[[Tensor], Tensor] = lambda z: z,
) -> Tensor:
    which = rows(len(labels), with_sum)
    (wrapper,) = generate(
        lambda z, *labels: ops.row_stats(chain(z), list(labels), which),
        z,
        *labels,
        configuration=configuration,
    )
    out = torch.full((which.count(",") + 1, N), torch.nan, dtype=ops.stats_dtype(z))
    interpret(wrapper, [z, *labels], out)
    return out


def run_grad(
    z: Tensor,
    labels: list[Tensor],
    m: Tensor,
    coefficients: Tensor,
    with_sum: bool,
    configuration: int = 0,
    chain: Callable[[Tensor], Tensor] = lambda z: z,
) -> Tensor:
    which = rows(len(labels), with_sum)
    (wrapper,) = generate(
        lambda z, m, c, *labels: ops.row_grad(chain(z), list(labels), m, c, which),
        z,
        m,
        coefficients,
        *labels,
        configuration=configuration,
    )
    out = torch.full_like(z, torch.nan)
    interpret(wrapper, [z, m, coefficients, *labels], out)
    return out


def assert_stats(actual: Tensor, z: Tensor, labels: list[Tensor], with_sum: bool) -> None:
    expected = reference.stats(z, labels, with_sum)
    rtol = 1e-12 if z.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=rtol * 100, equal_nan=True)


def check_grad(z: Tensor, labels: list[Tensor], with_sum: bool, configuration: int = 0) -> None:
    acc = ops.stats_dtype(z)
    m, coefficients = z.to(acc).amax(1), torch.randn(2 + len(labels) + with_sum, N, dtype=acc)
    actual = run_grad(z, labels, m, coefficients, with_sum, configuration)
    expected = reference.grad(z, labels, m, coefficients, with_sum)
    tolerance = RELATIVE[z.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("configuration", range(len(lowering.STATS)))
def test_stats_at_every_vocabulary(v: int, configuration: int) -> None:
    if configuration >= len(lowering.stats_configurations(v, torch.float32, 1, True)):
        pytest.skip("equal to an earlier configuration at this V")
    z, labels = logits(v), labels_for(v, 1)
    assert_stats(run_stats(z, labels, True, configuration), z, labels, True)


@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("configuration", range(len(lowering.GRAD)))
def test_grad_at_every_vocabulary(v: int, configuration: int) -> None:
    if configuration >= len(lowering.grad_configurations(v, torch.float32, 1, True)):
        pytest.skip("equal to an earlier configuration at this V")
    check_grad(logits(v), labels_for(v, 1), True, configuration)


@pytest.mark.parametrize("dtype", RELATIVE)
def test_every_dtype(dtype: torch.dtype) -> None:
    z, labels = logits(257, dtype), labels_for(257, 2)
    assert_stats(run_stats(z, labels, True), z, labels, True)
    check_grad(z, labels, True)


@pytest.mark.parametrize("with_sum", [False, True])
@pytest.mark.parametrize("n_labels", [0, 1, 2])
def test_every_set_of_rows(n_labels: int, with_sum: bool) -> None:
    z, labels = logits(300), labels_for(300, n_labels)
    assert_stats(run_stats(z, labels, with_sum), z, labels, with_sum)
    check_grad(z, labels, with_sum)


@pytest.mark.parametrize("finite", [0, 4500, 9000, 18999])
def test_one_finite_column(finite: int) -> None:
    z = torch.full((N, 19000), MINUS_INFINITY)
    z[:, finite] = torch.tensor([1.0, -2.0, MINUS_INFINITY])
    actual = run_stats(z, [], False)
    assert actual.tolist() == [[1.0, -2.0, MINUS_INFINITY], [1.0, 1.0, 0.0]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 9000, 18999])
def test_not_finite(value: float, column: int) -> None:
    z = logits(19000)
    z[1, column] = value
    m, d = run_stats(z, [], False)
    assert d.isnan().tolist() == [False, True, False]
    assert_stats(torch.stack([m, d])[:, ::2], z[::2], [], False)


def test_ignored_rows_are_written() -> None:
    z, labels = logits(5000), [torch.full((N,), -100)]
    z[1, 17] = torch.nan
    dz = run_grad(z, labels, logits(1)[:, 0], torch.zeros(3, N), False)
    assert dz[::2].eq(0).all()
    assert dz[1].isnan().sum() == 1


def test_strided_inputs() -> None:
    z, y = logits(5000)[:, 1:4098], torch.arange(2 * N)[::2]
    assert_stats(run_stats(z, [y], True), z, [y], True)
    m, coefficients = logits(2)[:, 1] + 5, torch.randn(N, 4).t()
    (wrapper,) = generate(lambda z, m, c, y: ops.row_grad(z, [y], m, c, rows(1, True)), z, m, coefficients, y)
    out = torch.full(z.shape, torch.nan)
    interpret(wrapper, [z, m, coefficients, y], out)
    expected = reference.grad(z, [y], m, coefficients, True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("v", [257, 20000])
def test_fused_chain(v: int) -> None:
    z, labels = logits(v), labels_for(v, 2)
    chained = 5 - 1.7 * z
    assert_stats(run_stats(z, labels, True, chain=lambda z: 5 - 1.7 * z), chained, labels, True)
    m, coefficients = chained.amax(1), torch.randn(5, N)
    actual = run_grad(z, labels, m, coefficients, True, chain=lambda z: 5 - 1.7 * z)
    expected = reference.grad(chained, labels, m, coefficients, True)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("v", [1, 50257, 128256])
def test_triton_accepts_them(v: int) -> None:
    y = torch.empty(N, dtype=torch.int64, device="meta")
    z = torch.empty(N, v, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(N, device="meta")
    for wrapper in generate(reference.loss, z, y, weight):
        name, source = next(item for item in wrapper.kernels.items() if item[0].startswith("triton_tem"))
        assert triton_ir(source, name, wrapper.signature(name))
