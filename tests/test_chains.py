"""Chains of 16-bit operations between head and loss: kernels take them in float32, as plain Inductor's do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
import torch.nn.functional as F
from gpu_codegen import Wrapper, generate, interpret
from torch import Tensor

import inductor_ce
from inductor_ce import ops
from inductor_ce.heads.recompute import recompute_chains
from inductor_ce.ops import lowering

Chain = Callable[[Tensor, Tensor], Tensor]

CHAINS: dict[str, Chain] = {
    "soft-cap": lambda z, b: 20 * torch.tanh(z / 20),
    "cap by sigmoid": lambda z, b: 30 * torch.sigmoid(z / 7.5),
    "bias": lambda z, b: z + b,
    "temperature": lambda z, b: z / 0.7,
    "scale": lambda z, b: z * 1.3,
    "bias and soft-cap": lambda z, b: 20 * torch.tanh((z + b) / 20),
}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
TRITON = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}
ROWS = "max,sumexp,pick"

every_chain = pytest.mark.parametrize("name", CHAINS)
every_half = pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)


def nll(z: Tensor, y: Tensor) -> Tensor:
    m, d, picked = ops.row_stats(z, [y], [], ROWS).unbind(0)
    return d.log() + m - picked


@pytest.fixture(autouse=True)
def registered() -> None:
    lowering.register()


def templates(wrapper: Wrapper) -> list[str]:
    return [source for name, source in wrapper.kernels.items() if name.startswith("triton_tem")]


@pytest.mark.in_turns
@every_half
@every_chain
def test_nothing_is_rounded_within(name: str, dtype: torch.dtype) -> None:
    """Neither where the kernels read the chain, nor between the gradient and the chain's derivative."""
    z = torch.empty(64, 32000, dtype=dtype, device="meta", requires_grad=True)
    b, y = torch.empty(32000, dtype=dtype, device="meta"), torch.empty(64, dtype=torch.int64, device="meta")

    def loss(z: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return nll(CHAINS[name](z, b), y).mean()

    forward, backward = generate(loss, z, b, y, prepare_joint=recompute_chains)
    for wrapper in (forward, backward):
        (kernel,) = templates(wrapper)
        assert TRITON[dtype] not in kernel
    assert [shape for shape in forward.allocations if 32000 in shape] == []
    assert [shape for shape in backward.allocations if 32000 in shape] == [(64, 32000)]
    assert [shape for shape in backward.allocations_of("float32") if 32000 in shape] == []


@every_half
def test_what_others_read_as_well_is_stored_in_16_bits(dtype: torch.dtype) -> None:
    """A gradient of the logits with another reader is no reason for a tensor in float32."""
    z = torch.empty(64, 32000, dtype=dtype, device="meta", requires_grad=True)
    b = torch.empty(32000, dtype=dtype, device="meta", requires_grad=True)
    y = torch.empty(64, dtype=torch.int64, device="meta")

    def loss(z: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return nll(2 * (z + b), y).mean()

    _, backward = generate(loss, z, b, y, prepare_joint=recompute_chains)
    assert [s for s in backward.allocations_of("float32") if s == (64, 32000)] == []


@pytest.mark.in_turns
@pytest.mark.parametrize("v", [257, 8192])
@every_half
@pytest.mark.parametrize(
    "name", [name for name in CHAINS if "soft-cap" not in name]
)  # interpreters lack tanh
def test_statistics_are_those_of_the_float32_chain(name: str, dtype: torch.dtype, v: int) -> None:
    z, b, y = (3 * torch.randn(3, v)).to(dtype), torch.randn(v).to(dtype), torch.randint(v, (3,))
    (wrapper,) = generate(lambda z, b, y: ops.row_stats(CHAINS[name](z, b), [y], [], ROWS), z, b, y)
    actual = torch.full((3, 3), torch.nan)
    interpret(wrapper, [z, b, y], actual)
    x = CHAINS[name](z.double(), b.double())
    m, lse = x.amax(1), x.logsumexp(1)
    assert (actual[0] - m).abs().max() < 1e-5
    assert (actual[1].double().log() + actual[0] - lse).abs().max() < 1e-5
    assert (actual[2] - x[torch.arange(3), y]).abs().max() < 1e-5


SOFT = "max,sumexp,dot:0,mass:0"


def target(t: Tensor) -> Tensor:
    """Weights of rows and classes, made of the logits of a teacher."""
    m, d = ops.row_stats(t, [], [], "max,sumexp").unbind(0)
    return ((t.float() - m[:, None]).exp() / d[:, None]).detach()


@every_half
def test_weights_are_made_where_they_are_read(dtype: torch.dtype) -> None:
    """Neither in the forward nor in the backward are they in memory, and no logits but those given are."""
    z = torch.empty(64, 32000, dtype=dtype, device="meta", requires_grad=True)
    t = torch.empty(64, 32000, dtype=dtype, device="meta")

    def loss(z: Tensor, t: Tensor) -> Tensor:
        _, d, dot, mass = ops.row_stats(z, [], [target(t)], SOFT).unbind(0)
        return (mass * d.log() - dot).mean()

    forward, backward = generate(loss, z, t, prepare_joint=recompute_chains)
    assert [shape for shape in forward.allocations if 32000 in shape] == []
    assert backward.allocations_of(str(dtype).removeprefix("torch.")) == [(64, 32000)]
    assert len([shape for shape in backward.allocations if 32000 in shape]) == 1


@pytest.mark.in_turns
@pytest.mark.parametrize("v", [257, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_over_weights_that_are_made(dtype: torch.dtype, v: int) -> None:
    """Of what interpreters have: they lack exp of the library."""
    z, t, scale = torch.randn(3, v).to(dtype), (3 * torch.randn(3, v)).to(dtype), torch.rand(3, 1)
    (wrapper,) = generate(lambda z, t, a: ops.row_stats(z, [], [t.float().square() * a], SOFT), z, t, scale)
    actual = torch.full((4, 3), torch.nan)
    interpret(wrapper, [z, t, scale], actual)
    x, q = z.double(), t.double().square() * scale.double()
    m = x.amax(1, keepdim=True)
    exact = torch.stack([m[:, 0], (x - m).exp().sum(1), (q * (x - m)).sum(1), q.sum(1)])
    assert ((actual - exact).abs() / exact.abs().clamp_min(1)).max() < 1e-5


@pytest.mark.parametrize("shape", [(3, 257), (257,)])
def test_weights_that_are_constant(shape: tuple[int, ...]) -> None:
    """Of rows and classes they are no tile of a template, which Inductor would yet let absorb them."""
    (wrapper,) = generate(lambda z: ops.row_stats(z, [], [torch.full(shape, 0.5)], SOFT), torch.randn(3, 257))
    assert len(templates(wrapper)) == len(shape) % 2


# On a GPU

N, V = 4096, 32000


def errors(f: Callable[..., Tensor], z: Tensor, b: Tensor, y: Tensor, exact: list[Tensor]) -> list[Tensor]:
    """[mean and worst error of the losses of rows, mean and worst of the gradient's rows, in norm]"""
    leaf = z.detach().clone().requires_grad_()
    losses = f(leaf, b, y)
    (dz,) = torch.autograd.grad(losses.sum(), leaf)
    of_rows = (losses.double() - exact[0]).abs(), (dz.double() - exact[1]).norm(dim=1)
    return [how(e) for e in of_rows for how in (torch.mean, torch.amax)]


@pytest.mark.gpu
@every_half
@every_chain
def test_as_exact_as_plain(name: str, dtype: torch.dtype) -> None:
    """Mean and worst error are at most 1.02 of the smaller of eager's and plain Inductor's, plus a little.

    Losses are float32, and so near to exact that what is left is their last place.
    """
    z = (5 * torch.randn(N, V, device="cuda")).to(dtype)
    b, y = torch.randn(V, device="cuda").to(dtype), torch.randint(V, (N,), device="cuda")

    def loss(z: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(CHAINS[name](z, b).float(), y, reduction="none")

    leaf = z.double().requires_grad_()
    x = CHAINS[name](leaf, b.double())
    rows = reference.log_sum_exp(x) - x.gather(1, y[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(rows.sum(), leaf)
    exact = [rows.detach(), gradient]
    eager, plain = (errors(f, z, b, y, exact) for f in (loss, torch.compile(loss)))
    torch._dynamo.reset()
    with inductor_ce.install():
        ours = errors(torch.compile(loss), z, b, y, exact)
    last_place = torch.finfo(torch.float32).eps * rows.abs()
    little = (last_place.mean(), last_place.amax(), 0, 0)
    accepted = [1.02 * torch.minimum(e, p) + few for e, p, few in zip(eager, plain, little, strict=True)]
    told = [[f"{x:.3e}" for x in xs] for xs in (ours, plain, eager)]
    assert all(o <= a for o, a in zip(ours, accepted, strict=True)), told
