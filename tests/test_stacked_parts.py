"""Several heads' logits that are stacked, and taken again one by one: numbers, heads, what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gallery import check_numbers, run
from harness import Rewritten, compile_without_codegen
from head_cases import counts
from torch import Tensor

from inductor_ce.graph.shapes import example_of

B, S, V, D, K = 2, 5, 12, 4, 3
STACKS = (torch.stack, torch.cat)


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    h, w = (torch.randn(size).to(dtype).requires_grad_() for size in ((B, S, D), (K, V, D)))
    return h, w, torch.randint(V, (K, B, S))


def heads(h: Tensor, w: Tensor) -> list[Tensor]:
    return [F.linear(h, w[k]) for k in range(K)]


def ce(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1))


def of_first(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = torch.stack(heads(h, w))
    return sum(ce(z[k], y[k]) / (1 + k) for k in range(K))  # type: ignore[return-value]


def of_middle(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = torch.stack(heads(h, w), dim=1)
    return sum(ce(z[:, k, ...].contiguous().view(-1, V), y[k]) * (k - 3) for k in range(K))  # type: ignore[return-value]


def of_last(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = torch.stack(heads(h, w), -1).float()
    return torch.stack([-z[..., k - K].log_softmax(-1).gather(-1, y[k][..., None]).sum() for k in range(K)])


def of_ranges(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = torch.stack(heads(h, w)).float()[:, :, 1:]
    return sum(ce(z[k, :, : 4 - k], y[k, :, 1 : 5 - k]) for k in range(K))  # type: ignore[return-value]


def of_new_dimensions(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = torch.cat([z[:, None] if k else z.unsqueeze(1) for k, z in enumerate(heads(h, w))], 1)
    return sum(ce(z.select(1, k), y[k]) for k in range(K))  # type: ignore[return-value]


def unbound(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    each = torch.stack(heads(h, w), 2).unbind(-2)
    return sum(ce(z, y[k]) for k, z in enumerate(each))  # type: ignore[return-value]


def one_place(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = torch.stack([z.float() for z in heads(h, w)])
    return sum(ce(z[k, :, -1], y[k, :, -1]) for k in range(K))  # type: ignore[return-value]


LOSSES = [of_first, of_middle, of_last, of_ranges, of_new_dimensions, unbound, one_place]


@pytest.mark.parametrize("f", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers(f: Callable[..., Tensor], dtype: torch.dtype) -> None:
    backend = Rewritten()
    args = given(dtype)
    check_numbers(run(torch.compile(f, backend=backend, fullgraph=True), args), f, args)
    assert len(backend.report.sites) == K
    assert joins(backend) == 0


def joins(backend: Rewritten) -> int:
    """How often something as large as the logits is stacked."""
    (graph,) = backend.final
    stacks = [example_of(node) for node in graph.graph.nodes if node.target in STACKS]
    return sum(example.numel() >= K * V for example in stacks)


@pytest.mark.parametrize("f", LOSSES)
def test_heads_in_pieces(f: Callable[..., Tensor]) -> None:
    compiled, _ = compile_without_codegen(f, strategy="token_chunks", memory_budget=0.9)
    args = given()
    check_numbers(run(compiled, args), f, args)
    assert counts().keys() <= {"token_chunks", "vocab_slabs"}
    assert sum(counts().values()) == K


def read_whole(h: Tensor, w: Tensor, y: Tensor) -> Any:
    z = torch.stack(heads(h, w))
    return sum(ce(z[k], y[k]) for k in range(K)), z.argmax(-1)


def returned(h: Tensor, w: Tensor, y: Tensor) -> Any:
    z = torch.stack(heads(h, w))
    return sum(ce(z[k], y[k]) for k in range(K)), z


def some_unread(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """That of the last has a gradient of zeros, which is not none."""
    z = torch.stack([*heads(h, w), F.linear(h, w[0].clone())])
    return ce(z[0], y[0]) + ce(z[1], y[1])


def some_without_a_gradient(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The last is read, for how often it is right."""
    z = torch.stack([*heads(h, w), F.linear(h, w[0].clone())])
    right = (z[3].argmax(-1) == y[0]).float().mean()
    return ce(z[0], y[0]) + ce(z[1], y[1]) + ce(z[2], y[2]) * right


def some_held_without_a_gradient(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = torch.stack(heads(h, w))
    second = z[1]
    with torch.no_grad():
        scale = ce(second, y[1])
    return ce(z[0], y[0]) * scale + ce(z[2], y[2])


def edited(h: Tensor, w: Tensor, y: Tensor) -> Any:
    parts = heads(h, w)
    z = torch.stack(parts)
    first = z[0]
    first.mul_(2)
    return ce(z[0], y[0]) + ce(z[1], y[1]) + ce(z[2], y[2])


def part_edited(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    parts = heads(h, w)
    z = torch.stack(parts)
    parts[0].mul_(2)
    return ce(z[0], y[0]) + ce(z[1], y[1]) + ce(z[2], y[2])


def detached_in_part(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        z = torch.stack(heads(h, w))
    return (h.sum() + ce(z[0], y[0]) + ce(z[1], y[1])) * ce(z[2], y[2])


def detached_where_taken(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    parts = heads(h, w)
    with torch.no_grad():
        z = torch.stack(parts)
        first, second, third = z[0], z[1], z[2]
    return h.sum() * (ce(first, y[0]) + ce(second, y[1])) + ce(third, y[2])


def given_parts(h: Tensor, w: Tensor, y: Tensor) -> Any:
    """What is returned is no alias of what was given."""
    z = torch.stack([w[0], w[1], w[2]])
    return ce(z[0] @ w[2].t(), y[:2].flatten()[:V]), z[1]


def by_tensor(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = torch.stack(heads(h, w), 1)
    rows = y[0, :, :2] % B
    return ce(z[rows[:, 0], 0, rows[:, 1]], y[0, :, 0]) + ce(z[:, 1], y[1]) + ce(z[:, 2], y[2])


LEFT = [
    *(read_whole, returned, some_unread, some_without_a_gradient, some_held_without_a_gradient, edited),
    *(part_edited, detached_in_part, detached_where_taken, given_parts, by_tensor),
]


@pytest.mark.parametrize("f", LEFT)
def test_what_is_left_is_right(f: Callable[..., Any]) -> None:
    backend = Rewritten()
    args = given()
    check_numbers(run(torch.compile(f, backend=backend, fullgraph=True), args), f, args)
    assert joins(backend) >= 1


def of_one_without_grad(z: Tensor, y: Tensor) -> Tensor:
    second = z[1]
    with torch.no_grad():
        scale = ce(second, y[1])
    return ce(z[0], y[0]) * scale


def of_a_teacher(z: Tensor, y: Tensor) -> Tensor:
    """Of which the loss needs a gradient, of zeros for what it is stacked with."""
    return ce(z[1], z[0].argmax(-1))


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("f", [of_one_without_grad, of_a_teacher])
def test_gradients_of_zeros_are_not_none(f: Callable[..., Tensor], detached: bool) -> None:
    def loss(h: Tensor, v: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return f(torch.stack([F.linear(h, v), F.linear(h, w).detach() if detached else F.linear(h, w)]), y)

    h, w, y = given()
    leaves = [x.detach().clone().requires_grad_() for x in (h, w[0], w[1])]
    ways = (loss, torch.compile(loss, backend=Rewritten(), fullgraph=True))
    grads = [torch.autograd.grad(way(*leaves, y), leaves, allow_unused=True) for way in ways]
    assert [g is None for g in grads[1]] == [g is None for g in grads[0]]
    for ours, theirs in zip(*grads, strict=True):
        assert ours is None or torch.allclose(ours, theirs, atol=1e-6)


def test_other_sizes_are_compiled_once() -> None:
    backend = Rewritten()
    compiled = torch.compile(of_middle, backend=backend, fullgraph=True, dynamic=True)
    for n in (B + 4, B + 2, B + 3):
        h, w, y = given()
        args = (h.detach().repeat(3, 1, 1)[:n].requires_grad_(), w, y.repeat(1, 3, 1)[:, :n])
        with torch._dynamo.config.patch(error_on_recompile=n != B + 4):
            check_numbers(run(compiled, args), of_middle, args)
    assert len(backend.report.sites) == K
    assert joins(backend) == 0
