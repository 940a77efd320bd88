"""The kernels on a GPU: numbers against float64, fusion, large offsets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import kernel_reference as reference
import pytest
import torch
from gpu_codegen import Wrapper
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from inductor_ce import ops
from inductor_ce.common.compat import templates
from inductor_ce.ops import lowering

pytestmark = pytest.mark.gpu

RELATIVE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5, torch.float64: 1e-12}

# The loss is a sum over rows in float32: 1e-7 would be less than one unit of its last place.
LAST_PLACES = 4


@pytest.fixture(autouse=True)
def one_configuration(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing to time, nothing cached."""
    lowering.register()
    only(0, monkeypatch)
    torch._dynamo.reset()
    with torch._inductor.config.patch(
        force_disable_caches=True, joint_custom_post_pass=reference.recompute_chain
    ):
        yield


def only(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave one configuration of each kernel."""
    for name in ("STATS", "STATS_OF_MORE", "GRAD"):
        monkeypatch.setattr(lowering, name, getattr(lowering, name)[index : index + 1])


def logits(n: int, v: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (3 * torch.randn(n, v, device="cuda")).to(dtype).requires_grad_()


def poison(*like: Tensor) -> None:
    """Leave NaN in the memory that the next allocations of these sizes get."""
    for t in like:
        torch.full_like(t, torch.nan)


def identity(x: Tensor, bias: Tensor) -> Tensor:
    return x


Chain = Callable[[Tensor, Tensor], Tensor]


def check(x: Tensor, chain: Chain = identity, dynamic: bool = False) -> None:
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
    assert_near(actual, dx, expected, dxd)


def check_every_row(x: Tensor, chain: Chain = identity, dynamic: bool = False) -> None:
    """`check` of a loss that uses every row."""
    n, v = x.shape
    y, weight = reference.random_labels(n, v, device="cuda"), torch.rand(n, device="cuda")
    q, cost = reference.random_weights(n, v, "cuda")
    bias = torch.randn(v, device="cuda")

    def f(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, q: Tensor, cost: Tensor) -> Tensor:
        return reference.loss_of_every_row(chain(x, bias), y, weight, q, cost)

    poison(x)
    actual = torch.compile(f, dynamic=dynamic)(x, y, weight, bias, q, cost)
    (dx,) = torch.autograd.grad(actual, x)
    xd = x.detach().double().requires_grad_()
    zd = chain(xd, bias.double()).double()
    expected = reference.loss_of_every_row_reference(zd, y, weight.double(), q.double(), cost.double())
    (dxd,) = torch.autograd.grad(expected, xd)
    assert_near(actual, dx, expected, dxd)


def assert_near(actual: Tensor, dx: Tensor, expected: Tensor, dxd: Tensor) -> None:
    tolerance = RELATIVE[dx.dtype]
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


@pytest.mark.parametrize("v", [2, 7, 130, 4097, 32000, 32768, 128256])
def test_every_row_of_any_vocabulary(v: int) -> None:
    check_every_row(logits(37, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_every_row_of_any_dtype(dtype: torch.dtype) -> None:
    check_every_row(logits(37, 128256 if dtype == torch.float32 else 32000, dtype))


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("check", [check, check_every_row])
def test_every_configuration(
    check: Callable[[Tensor], None], index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    only(index, monkeypatch)
    check(logits(37, 50264))


@pytest.mark.parametrize("check", [check, check_every_row])
def test_autotuned(check: Callable[[Tensor], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    check(logits(512, 32000))


def test_no_room_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(templates, "autotune_select_algorithm", out_of_memory)
    check(logits(37, 32000))


@pytest.mark.parametrize("chain", reference.CHAINS)
@pytest.mark.parametrize("v", [32000, 50257, 65536])
def test_chain(chain: Chain, v: int) -> None:
    if chain is reference.soft_cap_16_bit:
        pytest.skip("rounds differently in eager: test_chain_is_fused checks the code")
    check(logits(37, v), chain)


@pytest.mark.parametrize("chain", [reference.soft_cap, reference.add_bias])
@pytest.mark.parametrize("v", [32000, 32768])
def test_chain_before_every_row(chain: Chain, v: int) -> None:
    check_every_row(logits(37, v), chain)


@pytest.mark.parametrize("chain", reference.CHAINS)
@pytest.mark.parametrize("every", [False, True])
def test_chain_is_fused(every: bool, chain: Chain) -> None:
    n, v = 64, 32000
    x, bias = logits(n, v), torch.randn(v, device="cuda")
    y, weight = reference.random_labels(n, v, device="cuda"), torch.rand(n, device="cuda")
    weights = reference.random_weights(n, v, "cuda") if every else ()
    loss = reference.loss_of_every_row if every else reference.loss

    def step(x: Tensor) -> Tensor:
        return torch.compile(lambda x: loss(chain(x, bias), y, weight, *weights))(x)

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
def test_offsets_beyond_32_bits(n: int, chain: Chain) -> None:
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


@pytest.mark.parametrize("n", [32767, 32768])
def test_offsets_beyond_32_bits_of_every_row(n: int) -> None:
    """Of the logits, of a weight that is as large, and of the gradient."""
    v, last, which = 65537, 3, reference.every_row(1, 2)
    x = torch.empty(n, v, device="cuda", dtype=torch.bfloat16).normal_(0, 3).requires_grad_()
    q, cost = torch.empty_like(x, requires_grad=False).uniform_(), torch.rand(v, device="cuda")
    y = reference.random_labels(n, v, device="cuda").flip(0).contiguous()
    weight = torch.ones(n, device="cuda")

    @torch.compile
    def f(x: Tensor, y: Tensor, q: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        stats = ops.row_stats(x.detach(), [y], [q, cost], which)
        return reference.loss_of_every_row(x, y, weight, q, cost), stats

    poison(x)
    loss, stats = f(x, y, q, cost)
    (dx,) = torch.autograd.grad(loss, x)
    for rows in (slice(None, last), slice(-last, None)):
        expected = reference.stats(x[rows], [y[rows]], [q[rows], cost], which)
        torch.testing.assert_close(stats[:, rows].double(), expected, rtol=1e-4, atol=1e-2)
        xd = x[rows].detach().double().requires_grad_()
        per_row = weight[rows].double(), q[rows].double(), cost.double()
        (dxd,) = torch.autograd.grad(reference.loss_of_every_row_reference(xd, y[rows], *per_row), xd)
        assert (dx[rows].double() - dxd).norm() <= RELATIVE[x.dtype] * dxd.norm()
    assert dx.isfinite().all()


WEIGHTS: dict[str, Callable[[int, int], Tensor]] = {
    "bool, of columns": lambda n, v: torch.randn(v, device="cuda") > 0,
    "float16, strided": lambda n, v: torch.randn(n, 2 * v, device="cuda").half()[:, ::2],
    "int64, transposed": lambda n, v: torch.randint(-9, 9, (v, n), device="cuda").t(),
    "float64, expanded over columns": lambda n, v: torch.randn(n, 1, device="cuda").double().expand(n, v),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_of_any_kind(kind: str) -> None:
    n, v, which = 33, 32000, reference.rows(0, *reference.weighted(2))
    z, q = logits(n, v, torch.float32).detach(), [WEIGHTS[kind](n, v), torch.rand(v, device="cuda")]
    m, c = z.amax(1), torch.randn(8, n, device="cuda")

    @torch.compile
    def both(z: Tensor, m: Tensor, c: Tensor, *q: Tensor) -> tuple[Tensor, Tensor]:
        return ops.row_stats(z, [], [*q], which), ops.row_grad(z, [], [*q], m, c, which)

    stats, dz = both(z, m, c, *q)
    torch.testing.assert_close(stats.double(), reference.stats(z, [], q, which), rtol=1e-4, atol=1e-2)
    expected = reference.grad(z, [], q, m, c, which)
    torch.testing.assert_close(dz.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("where", [slice(0, 1), slice(0, 9000), slice(20000, 29000), slice(24000, 32000)])
def test_not_finite(value: float, where: slice) -> None:
    x = logits(8, 32000).detach()
    x[3, where] = value
    actual = torch.compile(lambda x: ops.row_stats(x, [], [], "max,sumexp,sum"))(x)
    m, d, total = reference.stats(x, [], [], "max,sumexp,sum")
    torch.testing.assert_close(actual[1].log() + actual[0], (d.log() + m).float(), equal_nan=True)
    torch.testing.assert_close(actual[2], total.float(), equal_nan=True, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("where", [slice(0, 9000), slice(24000, 32000), slice(0, 32000)])
def test_every_row_of_what_is_not_finite(value: float, where: slice) -> None:
    """A maximum may or may not see NaN; all other rows agree."""
    x, q, which = logits(8, 32000).detach(), torch.rand(32000, device="cuda") + 0.1, reference.every_row(0, 1)
    x[3, where] = value
    actual = torch.compile(lambda x, q: ops.row_stats(x, [], [q], which))(x, q)
    expected = reference.stats(x, [], [q], which).float()
    torch.testing.assert_close(actual[1:], expected[1:], equal_nan=True, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("v", [130, 32768, 50257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_argmax_of_ties_is_the_first(v: int, dtype: torch.dtype) -> None:
    x = logits(6, v, dtype).detach().clamp(max=3)
    x[0, [v // 3, v // 3 + 1, v - 1]] = 20
    x[1, [v - 1, v - 2]] = 20
    x[2], x[3], x[3, v // 2 :], x[4, v - 1] = 0.5, torch.inf, torch.nan, torch.nan
    x[5] = -torch.inf
    actual = torch.compile(lambda x: ops.row_stats(x, [], [], "max,sumexp,argmax"))(x)[2]
    assert actual.tolist() == [v // 3, v - 2, 0, v // 2, v - 1, 0]


def test_gradient_of_a_logit_of_minus_infinity() -> None:
    n, v, which = 8, 32000, reference.every_row(1, 2)
    z, y = logits(n, v, torch.float32).detach(), reference.random_labels(n, v, device="cuda")
    z[:, [0, 20000, v - 1]] = -torch.inf
    q, m, c = reference.random_weights(n, v, "cuda"), z.amax(1), torch.randn(12, n, device="cuda")
    compiled = torch.compile(lambda z, y, m, c, *q: ops.row_grad(z, [y], [*q], m, c, which))
    expected = reference.grad(z, [y], q, m, c, which)
    torch.testing.assert_close(compiled(z, y, m, c, *q).double(), expected, rtol=1e-5, atol=1e-4)


def test_row_of_minus_infinity() -> None:
    x = torch.full((3, 5000), -torch.inf, device="cuda")
    actual = torch.compile(lambda x: ops.row_stats(x, [], [], "max,sumexp,sumexpz,argmax"))(x)
    assert actual[0].eq(-torch.inf).all()
    assert actual[1:].eq(0).all()


@pytest.mark.parametrize("expanded", [False, True])
def test_coefficients_of_any_strides(expanded: bool) -> None:
    n, v = 33, 32000
    z, y = logits(n, v).detach(), reference.random_labels(2 * n, v, torch.int32, "cuda")[::2]
    m = z.float().amax(1)
    if expanded:
        coefficients = torch.rand(3, 1, device="cuda").expand(3, n)
    else:
        coefficients = torch.rand(n, 3, device="cuda").t()
    compiled = torch.compile(lambda z, y, m, c: ops.row_grad(z, [y], [], m, c, "max,sumexp,pick"))
    expected = reference.grad(z, [y], [], m, coefficients, "max,sumexp,pick")
    torch.testing.assert_close(compiled(z, y, m, coefficients).double(), expected, rtol=1e-2, atol=1e-5)


def test_transposed_afterwards() -> None:
    n, v = 33, 5000
    z, y = logits(n, v).detach(), reference.random_labels(n, v, device="cuda")
    m, coefficients = z.float().amax(1), torch.rand(3, n, device="cuda")

    def f(z: Tensor, y: Tensor, m: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        dz = ops.row_grad(z, [y], [], m, c, "max,sumexp,pick")
        return dz.t().float().contiguous() + 1, ops.row_stats(z, [y], [], "max,sumexp,pick").t() * 2

    dz, stats = torch.compile(f)(z, y, m, coefficients)
    expected = reference.grad(z, [y], [], m, coefficients, "max,sumexp,pick").t() + 1
    torch.testing.assert_close(dz.double(), expected, rtol=1e-2, atol=1e-5)
    expected = 2 * reference.stats(z, [y], [], "max,sumexp,pick").t()
    torch.testing.assert_close(stats.double(), expected, rtol=1e-5, atol=1e-5)


def test_any_number_of_rows() -> None:
    which = reference.rows(1, "sumexpz", "argmax", *reference.weighted(2))
    compiled = torch.compile(lambda z, y, *q: ops.row_stats(z, [y], [*q], which), dynamic=True)
    for n in (5, 1, 0, 17):
        z, y = logits(n, 5000).detach(), reference.random_labels(n, 5000, device="cuda")
        q = reference.random_weights(n, 5000, "cuda")
        expected = reference.stats(z, [y], q, which).float()
        torch.testing.assert_close(compiled(z, y, *q), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("v", [5000, 32000])
def test_gradient_over_logits(v: int, every: bool) -> None:
    n, width = 512, 64
    h = torch.randn(n, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(v, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y, weight = reference.random_labels(n, v, device="cuda"), torch.rand(n, device="cuda")
    weights = reference.random_weights(n, v, "cuda") if every else ()
    loss = reference.loss_of_every_row if every else reference.loss
    compiled = torch.compile(lambda h, w: loss(h @ w.t(), y, weight, *weights))

    def step() -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(compiled(h, w), (h, w))

    (dh, dw), codes = run_and_get_code(step)
    assert (n, v) not in Wrapper(codes[1]).allocations
    again = step()
    assert torch.equal(dh, again[0])
    assert torch.equal(dw, again[1])
    z = (h @ w.t()).detach().double().requires_grad_()
    exact = reference.loss_of_every_row_reference if every else reference.loss_reference
    (dz,) = torch.autograd.grad(exact(z, y, weight.double(), *(q.double() for q in weights)), z)
    for actual, expected in ((dh, dz @ w.double()), (dw, dz.t() @ h.double())):
        assert (actual.double() - expected).norm() <= 1.6e-2 * expected.norm()
