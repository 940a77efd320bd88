"""The kernels on a GPU: numbers against float64, fusion, large offsets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import kernel_reference as reference
import pytest
import torch
from gpu_codegen import Wrapper
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from inductor_ce import compat, lowering, ops

pytestmark = pytest.mark.gpu

RELATIVE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5, torch.float64: 1e-12}

# The loss is a sum over rows in float32: 1e-7 would be less than one unit of its last place.
LAST_PLACES = 4


@pytest.fixture(autouse=True)
def one_configuration(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing to time, nothing cached."""
    lowering.register()
    monkeypatch.setattr(lowering, "STATS", lowering.STATS[:1])
    monkeypatch.setattr(lowering, "GRAD", lowering.GRAD[:1])
    torch._dynamo.reset()
    with torch._inductor.config.patch(
        force_disable_caches=True, joint_custom_post_pass=reference.recompute_chain
    ):
        yield


def logits(n: int, v: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (3 * torch.randn(n, v, device="cuda")).to(dtype).requires_grad_()


def poison(*like: Tensor) -> None:
    """Leave NaN in the memory that the next allocations of these sizes get."""
    for t in like:
        torch.full_like(t, torch.nan)


def identity(x: Tensor, bias: Tensor) -> Tensor:
    return x


def check(x: Tensor, chain: Callable[[Tensor, Tensor], Tensor] = identity, dynamic: bool = False) -> None:
    """Loss and gradient of a chain, compiled, against plain torch in float64."""
    n, v = x.shape
    y, weight = reference.random_labels(n, v, device="cuda"), torch.rand(n, device="cuda")
    bias = torch.randn(v, device="cuda")

    def f(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.loss(chain(x, bias), y, weight)

    poison(x)
    actual = torch.compile(f, dynamic=dynamic)(x, y, weight, bias)
    (dx,) = torch.autograd.grad(actual, x)
    xd = x.detach().double().requires_grad_()
    expected = reference.loss_reference(chain(xd, bias.double()).double(), y, weight.double())
    (dxd,) = torch.autograd.grad(expected, xd)
    tolerance = RELATIVE[x.dtype]
    rtol = max(tolerance / 100, LAST_PLACES * torch.finfo(actual.dtype).eps)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=0)
    assert (dx.double() - dxd).norm() <= tolerance * dxd.norm()
    assert (dx.double() - dxd).abs().max() <= 4 * tolerance * dxd.abs().max()


@pytest.mark.parametrize("v", [1, 7, 1000, 5000, 32000, 50257, 65537])
def test_any_vocabulary(v: int) -> None:
    check(logits(37, v))


@pytest.mark.parametrize("dtype", RELATIVE)
def test_any_dtype(dtype: torch.dtype) -> None:
    check(logits(37, 50257, dtype))


@pytest.mark.parametrize("index", range(4))
def test_every_configuration(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(lowering, "STATS", lowering.STATS[index : index + 1])
    monkeypatch.setattr(lowering, "GRAD", lowering.GRAD[index : index + 1])
    check(logits(37, 50264))


def test_autotuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    check(logits(512, 32000))


def test_no_room_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(compat, "autotune_select_algorithm", out_of_memory)
    check(logits(37, 32000))


@pytest.mark.parametrize("chain", reference.CHAINS)
@pytest.mark.parametrize("v", [32000, 50257])
def test_chain(chain: Callable[[Tensor, Tensor], Tensor], v: int) -> None:
    if chain is reference.soft_cap_16_bit:
        pytest.skip("rounds differently in eager: test_16_bit_chain_is_fused checks the code")
    check(logits(37, v), chain)


@pytest.mark.parametrize("chain", reference.CHAINS)
def test_chain_is_fused(chain: Callable[[Tensor, Tensor], Tensor]) -> None:
    n, v = 64, 32000
    x, bias = logits(n, v), torch.randn(v, device="cuda")
    y, weight = reference.random_labels(n, v, device="cuda"), torch.rand(n, device="cuda")

    def step(x: Tensor) -> Tensor:
        return torch.compile(lambda x: reference.loss(chain(x, bias), y, weight))(x)

    def both(x: Tensor) -> None:
        step(x).backward()

    _, codes = run_and_get_code(both, x)
    forward, backward = map(Wrapper, codes)
    assert [(n, v) in w.allocations for w in (forward, backward)] == [False, True]
    for wrapper in (forward, backward):
        assert sum(name.startswith("triton_tem") for name in wrapper.launches) == 1
        assert wrapper.allocations.count((n, v)) <= 1


@pytest.mark.parametrize("n", [32767, 32768])
@pytest.mark.parametrize("chain", [identity, reference.soft_cap])
def test_offsets_beyond_32_bits(n: int, chain: Callable[[Tensor, Tensor], Tensor]) -> None:
    v, last = 65537, 3
    x = torch.empty(n, v, device="cuda", dtype=torch.bfloat16).normal_(0, 3).requires_grad_()
    y = reference.random_labels(n, v, device="cuda").flip(0).contiguous()
    compiled = torch.compile(lambda x, y: reference.loss(chain(x, x), y, torch.ones_like(y)))
    poison(x)
    (dx,) = torch.autograd.grad(compiled(x, y), x)
    for rows in (slice(None, last), slice(-last, None)):
        xd = x[rows].detach().double().requires_grad_()
        expected = reference.loss_reference(chain(xd, xd).double(), y[rows], torch.ones_like(y[rows]))
        (dxd,) = torch.autograd.grad(expected, xd)
        assert (dx[rows].double() - dxd).norm() <= RELATIVE[x.dtype] * dxd.norm()
    assert dx.isfinite().all()


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("where", [slice(0, 1), slice(0, 9000), slice(20000, 29000), slice(24000, 32000)])
def test_not_finite(value: float, where: slice) -> None:
    x = logits(8, 32000).detach()
    x[3, where] = value
    actual = torch.compile(lambda x: ops.row_stats(x, [], "max,sumexp,sum"))(x)
    m, d, total = reference.stats(x, [], with_sum=True)
    torch.testing.assert_close(actual[1].log() + actual[0], (d.log() + m).float(), equal_nan=True)
    torch.testing.assert_close(actual[2], total.float(), equal_nan=True, rtol=1e-4, atol=1e-2)


def test_row_of_minus_infinity() -> None:
    x = torch.full((3, 5000), -torch.inf, device="cuda")
    actual = torch.compile(lambda x: ops.row_stats(x, [], "max,sumexp"))(x)
    assert actual[0].eq(-torch.inf).all()
    assert actual[1].eq(0).all()


@pytest.mark.parametrize("expanded", [False, True])
def test_coefficients_of_any_strides(expanded: bool) -> None:
    n, v = 33, 32000
    z, y = logits(n, v).detach(), reference.random_labels(2 * n, v, torch.int32, "cuda")[::2]
    m = z.float().amax(1)
    if expanded:
        coefficients = torch.rand(3, 1, device="cuda").expand(3, n)
    else:
        coefficients = torch.rand(n, 3, device="cuda").t()
    compiled = torch.compile(lambda z, y, m, c: ops.row_grad(z, [y], m, c, "max,sumexp,pick"))
    expected = reference.grad(z, [y], m, coefficients, with_sum=False)
    torch.testing.assert_close(compiled(z, y, m, coefficients).double(), expected, rtol=1e-2, atol=1e-5)


def test_transposed_afterwards() -> None:
    n, v = 33, 5000
    z, y = logits(n, v).detach(), reference.random_labels(n, v, device="cuda")
    m, coefficients = z.float().amax(1), torch.rand(3, n, device="cuda")

    def f(z: Tensor, y: Tensor, m: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        dz = ops.row_grad(z, [y], m, c, "max,sumexp,pick")
        return dz.t().float().contiguous() + 1, ops.row_stats(z, [y], "max,sumexp,pick").t() * 2

    dz, stats = torch.compile(f)(z, y, m, coefficients)
    expected = reference.grad(z, [y], m, coefficients, with_sum=False).t() + 1
    torch.testing.assert_close(dz.double(), expected, rtol=1e-2, atol=1e-5)
    expected = 2 * reference.stats(z, [y], with_sum=False).t()
    torch.testing.assert_close(stats.double(), expected, rtol=1e-5, atol=1e-5)


def test_any_number_of_rows() -> None:
    compiled = torch.compile(lambda z, y: ops.row_stats(z, [y], "max,sumexp,pick"), dynamic=True)
    for n in (5, 1, 0, 17):
        z, y = logits(n, 5000).detach(), reference.random_labels(n, 5000, device="cuda")
        torch.testing.assert_close(compiled(z, y), reference.stats(z, [y], with_sum=False).float())


@pytest.mark.parametrize("v", [5000, 32000])
def test_gradient_over_logits(v: int) -> None:
    n, width = 512, 64
    h = torch.randn(n, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(v, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y, weight = reference.random_labels(n, v, device="cuda"), torch.rand(n, device="cuda")
    compiled = torch.compile(lambda h, w: reference.loss(h @ w.t(), y, weight))

    def step() -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(compiled(h, w), (h, w))

    (dh, dw), codes = run_and_get_code(step)
    assert (n, v) not in Wrapper(codes[1]).allocations
    again = step()
    assert torch.equal(dh, again[0])
    assert torch.equal(dw, again[1])
    z = (h @ w.t()).detach().double().requires_grad_()
    (dz,) = torch.autograd.grad(reference.loss_reference(z, y, weight.double()), z)
    for actual, expected in ((dh, dz @ w.double()), (dw, dz.t() @ h.double())):
        assert (actual.double() - expected).norm() <= 1.6e-2 * expected.norm()
