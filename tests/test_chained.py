"""What lies between a product and the statistics of its rows, read as a chain of each element."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import Graphs, compile_without_codegen
from head_cases import counts
from reference import assert_fair
from torch import Tensor

from inductor_ce import ops
from inductor_ce.ops import chains

N, D, V = 48, 8, 64
Made = Callable[[Tensor], Tensor]
BOTH = ops.ROW_STATS_GRAD, ops.SOME_ROW_STATS_GRAD


def given(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, w, b = (3 * torch.randn(size, dtype=dtype) for size in ((N, D), (V, D), (V,)))
    y = torch.randint(0, V, (N,))
    y[::5] = -100
    return h.requires_grad_(), w.requires_grad_(), b.requires_grad_(), y


def capped(z: Tensor) -> Tensor:
    return 5 * torch.tanh(z / 5)


def capped_in_float32(z: Tensor) -> Tensor:
    return capped(z.float() if z.dtype.itemsize < 4 else z)


def scaled(z: Tensor) -> Tensor:
    return z * 0.0625


def scaled_and_capped(z: Tensor) -> Tensor:
    """In another shape."""
    return capped(z.view(4, -1, V) * 0.5).flatten(0, 1)


def clamped(z: Tensor) -> Tensor:
    return z.clamp(-4, 4)


def chosen(z: Tensor) -> Tensor:
    """By a number of the element, beside a literal that is a tensor."""
    return torch.where(z > torch.zeros(()), z, 0.25 * z)


def squared(z: Tensor) -> Tensor:
    return 1 - (z / 8) ** 2


def chosen_by_a_literal(z: Tensor) -> Tensor:
    return torch.where(torch.full((), True), 0.5 * z, z)


OF_ELEMENTS = (
    capped,
    capped_in_float32,
    scaled,
    scaled_and_capped,
    clamped,
    chosen,
    chosen_by_a_literal,
    squared,
)
READ = {f.__name__: f for f in OF_ELEMENTS}


def made(of: Made, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor], Graphs]:
    """(ours, those of the naive computation, exact ones, the graphs): the loss and its gradients"""

    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        z = of(F.linear(h, w, b))
        return F.cross_entropy(z.float() if z.itemsize < 4 else z, y)

    def run(f: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        value = f(*inputs)
        return [value, *torch.autograd.grad(value, inputs[:3])]

    inputs = given(dtype)
    compiled, graphs = compile_without_codegen(loss, strategy="token_chunks", memory_budget=0.8)
    exact = [x.detach().double().requires_grad_() for x in inputs[:3]]
    return run(compiled, *inputs), run(loss, *inputs), run(loss, *exact, inputs[3]), graphs


def assert_all_fair(ours: list[Tensor], naive: list[Tensor], exact: list[Tensor]) -> None:
    """Gradients are no worse than naive ones; of one loss alone it is chance how far the naive one is off."""
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2**-8, atol=0.0)
    for each in zip(ours[1:], naive[1:], exact[1:], strict=True):
        assert_fair(*each)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", READ)
def test_it_is_read(name: str, dtype: torch.dtype) -> None:
    """Nothing of the chain is left in the graph, and the gradient is no worse than the naive one."""
    ours, naive, exact, graphs = made(READ[name], dtype)
    assert counts() == {"token_chunks": 1}
    nodes = [node for node in graphs.nodes if node.target in BOTH]
    assert len(nodes) > 1
    assert len({node.kwargs["chain"] for node in nodes}) == 1, "all pieces have one chain"
    assert chains.decode(nodes[0].kwargs["chain"]) is not None
    assert not any(map(graphs.count, (torch.ops.aten.tanh.default, ops.ROW_GRAD, ops.SOME_ROW_GRAD)))
    assert_all_fair(ours, naive, exact)


def test_there_is_none() -> None:
    *_, graphs = made(lambda z: z, torch.float32)
    nodes = [node for node in graphs.nodes if node.target in BOTH]
    assert nodes
    assert not any(node.kwargs for node in nodes)


TEMPERATURES = torch.linspace(0.5, 2.0, N)[:, None]
OF_CLASSES = torch.linspace(-1.0, 1.0, V)


def by_rows(z: Tensor) -> Tensor:
    return z / TEMPERATURES.to(z.dtype)


def by_classes(z: Tensor) -> Tensor:
    return z + OF_CLASSES.to(z.dtype)


def by_a_tensor(z: Tensor) -> Tensor:
    return z * TEMPERATURES[3, 0].to(z.dtype)


def in_float64(z: Tensor) -> Tensor:
    return capped(z.double()).to(z.dtype)


def by_integers(z: Tensor) -> Tensor:
    return z * 0.5 + z.detach().to(torch.int64)


def less_twice(z: Tensor) -> Tensor:
    """The last argument is alpha, which ATen takes here by its place."""
    return torch.ops.aten.sub.Scalar(z, 1.5, 2) * z


UNREAD = {f.__name__: f for f in (by_rows, by_classes, by_a_tensor, in_float64, by_integers, less_twice)}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_is_made_of_two(name: str) -> None:
    ours, naive, exact, graphs = made(UNREAD[name], torch.float32)
    assert counts() == {"token_chunks": 1}
    assert not any(map(graphs.count, BOTH))
    assert_all_fair(ours, naive, exact)


def test_a_learnt_scale_is_not_read() -> None:
    """Its gradient is a sum over all logits."""
    h, w, _, y = given(torch.float32)
    s = torch.tensor(0.5, requires_grad=True)

    def loss(h: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return F.cross_entropy(h @ w.t() * s, y)

    compiled, graphs = compile_without_codegen(loss, strategy="token_chunks", memory_budget=0.8)
    ours = torch.autograd.grad(compiled(h, w, s), (h, w, s))
    for own, right in zip(ours, torch.autograd.grad(loss(h, w, s), (h, w, s)), strict=True):
        torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-5)
    assert not any(map(graphs.count, BOTH))
