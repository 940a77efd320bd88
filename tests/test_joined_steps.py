"""Probabilities of a loop's steps that are joined for a loss: numbers, heads, what is left."""

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

from inductor_ce import ops

N, S, V, D = 5, 3, 12, 4


def given(dtype: torch.dtype = torch.float32, n: int = N, v: int = V, d: int = D) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    leaves = (torch.randn(size).to(dtype).requires_grad_() for size in ((n, S, v), (n, S, d), (v, d), (v,)))
    return *leaves, torch.randint(v, (n, S))


def stacked(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    log_p = torch.stack([F.log_softmax(z[:, t], -1) for t in range(S)], 1)
    return F.nll_loss(log_p.reshape(-1, V), y.reshape(-1))


def stacked_behind(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(torch.stack([z[:, t].log_softmax(1) for t in range(S)], dim=2), y, ignore_index=2)


def one_after_another(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    log_p = torch.cat([torch.log_softmax(z[:, t], dim=-1) for t in reversed(range(S))])
    return -log_p.gather(1, y.flip(1).t().reshape(-1, 1)).mean()


def put_in_front(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    p = torch.cat([F.softmax(z[:, t], -1)[:, None] for t in range(S)], 1)
    return -(p.log() * F.one_hot(y, V)).sum(-1).sum()


def one_twice(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    first, last = z[:, 0].log_softmax(-1), z[:, -1].log_softmax(-1)
    log_p = torch.cat([first.unsqueeze(-2), last.unsqueeze(-2), first.unsqueeze(-2)], -2)
    return log_p.gather(-1, y[..., None]).squeeze(-1).sum(1)


LOSSES = [stacked, stacked_behind, one_after_another, put_in_front, one_twice]


@pytest.mark.parametrize("f", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers(f: Callable[..., Tensor], dtype: torch.dtype) -> None:
    backend = Rewritten()
    args = given(dtype)
    check_numbers(run(torch.compile(f, backend=backend, fullgraph=True), args), f, args)
    assert backend.count(ops.ROW_STATS) == len(backend.report.sites) == 1
    assert not backend.report.misses


def by_layer(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    steps = [F.linear(torch.tanh(h[:, t]), w, b).log_softmax(-1) for t in range(S)]
    return F.nll_loss(torch.stack(steps, 1).flatten(0, 1), y.flatten())


def by_matrix(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    steps = [F.log_softmax(h[:, t] @ w.t(), dim=1).unsqueeze(1) for t in range(S)]
    return -torch.cat(steps, 1).gather(2, y.unsqueeze(2)).mean()


@pytest.mark.parametrize("f", [by_layer, by_matrix])
def test_heads_in_pieces(f: Callable[..., Tensor]) -> None:
    compiled, graphs = compile_without_codegen(f, strategy="token_chunks", memory_budget=0.9)
    args = given()
    check_numbers(run(compiled, args), f, args)
    assert counts() == {"token_chunks": 1}
    assert graphs.pieces >= 2


def under_autocast(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        steps = [F.linear(h[:, t], w, b).log_softmax(-1) for t in range(S)]
        return F.nll_loss(torch.stack(steps, 1).flatten(0, 1), y.flatten(), reduction="none")


def joined_behind_autocast(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Outside the joined layer would not be cast."""
    with torch.autocast("cpu", torch.bfloat16):
        steps = [F.linear(h[:, t], w, b).log_softmax(-1) for t in range(S)]
    return F.nll_loss(torch.stack(steps, 1).flatten(0, 1), y.flatten(), reduction="none")


@pytest.mark.parametrize(("f", "n"), [(under_autocast, 1), (joined_behind_autocast, S)])
def test_autocast(f: Callable[..., Tensor], n: int) -> None:
    """Numbers as near as eager's under it; one layer for all steps where it is in the same region."""
    backend = Rewritten()
    args = given(n=64, v=200, d=16)
    check_numbers(run(torch.compile(f, backend=backend, fullgraph=True), args), f, args)
    (graph,) = backend.final
    assert sum(node.target is F.linear for node in graph.graph.nodes) == n


def with_the_likeliest(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Any:
    """Others need the log-probabilities of each step, which are kept beside the picks of these."""
    steps = [F.linear(h[:, t], w, b).log_softmax(-1) for t in range(S)]
    log_p = torch.cat([step.unsqueeze(1) for step in steps], 1)
    return F.nll_loss(log_p.flatten(0, 1), y.flatten()), [step.topk(2).indices for step in steps]


def behind_each_other(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Any:
    first, rest = z[:, 0].log_softmax(-1), z[:, 1:].flatten(0, 1).log_softmax(-1)
    picked = torch.cat([first, rest]).gather(1, torch.cat([y[:, 0], y[:, 1:].flatten()])[:, None])
    return picked.sum(), first.topk(2).values, rest.exp()


@pytest.mark.parametrize(("f", "n"), [(with_the_likeliest, S), (behind_each_other, 2)])
def test_steps_that_others_read(f: Callable[..., Any], n: int) -> None:
    backend = Rewritten()
    args = given()
    check_numbers(run(torch.compile(f, backend=backend, fullgraph=True), args), f, args)
    assert [bool(site.kept) for site in backend.report.sites] == [True] * n
    assert not backend.report.misses


def read_at_each_step(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Any:
    steps = [F.log_softmax(z[:, t], -1) for t in range(S)]
    return -torch.cat(steps).gather(1, y.t().reshape(-1, 1)).mean(), [
        step.detach().argmax(-1) for step in steps
    ]


def of_other_dimensions(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    steps = [F.log_softmax(z, -1), F.log_softmax(z, 0)]
    return -torch.stack(steps)[0].gather(-1, y[..., None]).mean()


def along_the_classes(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return -torch.cat([F.log_softmax(z[:, t], -1) for t in range(S)], -1).gather(1, y).mean()


def edited_meanwhile(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    x, steps = z[:, 0] * 1.0, []
    for _ in range(S):
        steps.append(F.softmax(x.detach(), -1))
        x.mul_(2)
    return -(torch.stack(steps, 1) * F.log_softmax(z, -1)).sum(-1).mean()


def edited_afterwards(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    log_p = torch.stack([F.log_softmax(z[:, t], -1) for t in range(S)], 1)
    log_p *= h[:, :, :1].detach()
    log_p[:, 0, 3] = -7.0
    return -log_p.gather(-1, y[..., None]).mean()


def of_several_matrices(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """As many rows as steps: batches of either would fit."""
    own = w.t() * torch.arange(1.0, 1 + S).to(w.dtype)[:, None, None]
    steps = [torch.matmul(h[:S, t : t + 1], own).log_softmax(-1) for t in range(S)]
    return -torch.stack(steps, 1).gather(-1, y[:S, :, None, None]).mean()


def some_without_gradient(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        first = F.log_softmax(z[:, 0], -1)
    log_p = torch.stack([first, *(F.log_softmax(z[:, t], -1) for t in range(1, S))], 1)
    return F.nll_loss(log_p.flatten(0, 1), y.flatten())


def viewed_without_gradient(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    first = F.log_softmax(z[:, 0], -1)
    with torch.no_grad():
        first = first.unsqueeze(1)
    log_p = torch.cat([first, *(F.log_softmax(z[:, t], -1).unsqueeze(1) for t in range(1, S))], 1)
    return F.nll_loss(log_p.reshape(-1, V), y.reshape(-1))


def of_copies_of_what_is_edited(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    weight, log_p = w.detach().clone(), []
    for t in range(S):
        log_p.append(F.linear(h[:, t], weight.clone()).log_softmax(-1))
        weight.mul_(1.5)
    return F.nll_loss(torch.stack(log_p, 1).reshape(-1, V), y.reshape(-1)) + 0 * w.sum()


def of_a_copy_without_gradient(z: Tensor, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        frozen = w.clone()
    log_p = [F.linear(h[:, t], w.clone() if t else frozen).log_softmax(-1) for t in range(S)]
    return F.nll_loss(torch.stack(log_p, 1).reshape(-1, V), y.reshape(-1))


LEFT = [read_at_each_step, of_other_dimensions, along_the_classes, edited_meanwhile, edited_afterwards]
LEFT += [of_several_matrices, some_without_gradient, viewed_without_gradient]
LEFT += [of_copies_of_what_is_edited, of_a_copy_without_gradient]


@pytest.mark.parametrize("f", LEFT)
def test_what_is_not_joined_is_right(f: Callable[..., Any]) -> None:
    backend = Rewritten()
    args = given()
    check_numbers(run(torch.compile(f, backend=backend, fullgraph=True), args), f, args)


def test_other_sizes_are_compiled_once() -> None:
    backend = Rewritten()
    compiled = torch.compile(stacked, backend=backend, fullgraph=True, dynamic=True)
    for n in (5, 7, 4):
        z, *others, y = given()
        args = (z.detach().repeat(2, 1, 1)[:n].requires_grad_(), *others, y.repeat(2, 1)[:n])
        with torch._dynamo.config.patch(error_on_recompile=n != 5):
            check_numbers(run(compiled, args), stacked, args)
    assert len(backend.report.sites) == 1
