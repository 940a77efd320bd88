"""A range of the classes of log-probabilities that is read beside their loss: numbers, what is left."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gallery import check_draws, check_numbers, run
from harness import Rewritten, compile_without_codegen, misses
from torch import Tensor

from inductor_ce import ops

N, V, K = 7, 24, 9


def given(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    z, w = (3 * torch.randn(N, V)).to(dtype).requires_grad_(), torch.rand(N, K).to(dtype)
    return z, w, torch.randint(V, (N,))


def picked(log_p: Tensor, y: Tensor) -> Tensor:
    return log_p.gather(1, y[:, None])


def copied(z: Tensor, w: Tensor, y: Tensor) -> Tensor:
    log_p = F.log_softmax(z, -1)
    return -torch.cat((picked(log_p, y), log_p[..., V - K :] + w.log()), -1).logsumexp(-1)


def narrowed(z: Tensor, w: Tensor, y: Tensor) -> Tensor:
    log_p = z.log_softmax(-1, dtype=torch.float32)
    return F.nll_loss(log_p, y) - (log_p.narrow(-1, 2, K).sigmoid() * w).sum(-1).mean()


def by_hand(z: Tensor, w: Tensor, y: Tensor) -> Tensor:
    log_p = z.float() - z.float().logsumexp(-1, keepdim=True)
    return -picked(log_p, y).sum() + torch.tanh(log_p[:, :K] * w).sum()


def two_ranges(z: Tensor, w: Tensor, y: Tensor) -> Tensor:
    log_p = F.log_softmax(z, -1)
    return -picked(log_p, y).mean() + (log_p[:, :K].sigmoid() * log_p[:, K : 2 * K].cos()).mean()


def shifted(z: Tensor, w: Tensor, y: Tensor) -> Tensor:
    log_p = F.log_softmax(z, -1) + 0.5
    return -picked(log_p, y)[:, 0] + torch.relu(log_p[:, 1 : K + 1] + 2).sum(-1)


RANGES = [copied, narrowed, by_hand, two_ranges, shifted]


@pytest.mark.parametrize("f", RANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers(f: Callable[..., Tensor], dtype: torch.dtype) -> None:
    backend = Rewritten(min_vocab=20)
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    check_draws(compiled, f, (given(dtype, seed) for seed in range(3)))
    assert backend.count(ops.ROW_STATS) == len(backend.report.sites) == 1
    assert not backend.report.misses


def is_wide(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.numel() == N * V


@pytest.mark.parametrize("f", RANGES)
def test_no_exponentials_of_all_classes(f: Callable[..., Tensor]) -> None:
    compiled, graphs = compile_without_codegen(f, min_vocab=20)
    check_draws(compiled, f, (given(seed=seed) for seed in range(3)))
    assert not [n for n in graphs.nodes if n.target == torch.ops.aten.exp.default and is_wide(n)]
    assert misses() == 0


@pytest.mark.parametrize("column", [1, V - 1])
def test_a_class_that_is_minus_infinity(column: int) -> None:
    z, w, y = given()
    z.data[:, column] = -math.inf
    backend, args = Rewritten(min_vocab=20), (z, w, torch.full_like(y, 3))
    check_numbers(run(torch.compile(copied, backend=backend), args), copied, args)
    assert len(backend.report.sites) == 1


def test_far_from_zero() -> None:
    """The maximum is taken off before the normaliser, which would be rounded at its size."""
    z, w, y = given()
    args = ((z.detach() + 1e4).requires_grad_(), w, y)
    check_numbers(run(torch.compile(copied, backend=Rewritten(min_vocab=20)), args), copied, args)


def most(z: Tensor, w: Tensor, y: Tensor) -> Tensor:
    log_p = F.log_softmax(z, -1)
    return -picked(log_p, y).mean() + log_p[:, 1:].sigmoid().mean()


def returned_too(z: Tensor, w: Tensor, y: Tensor) -> Any:
    log_p = F.log_softmax(z, -1)
    return -picked(log_p, y).mean() + (log_p[:, :K].sigmoid() * w).sum(), log_p


def edited(z: Tensor, w: Tensor, y: Tensor) -> Tensor:
    log_p = z - z.logsumexp(-1, keepdim=True)
    part = log_p[:, :K]
    part.mul_(w)
    return -picked(log_p, y).mean() + part.sigmoid().sum()


def of_no_loss(z: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return (F.log_softmax(z, -1)[:, :K].sigmoid() * w).sum(-1)


def of_some_rows(z: Tensor, w: Tensor, y: Tensor) -> Tensor:
    log_p = F.log_softmax(z, -1)
    return -picked(log_p, y).mean() + log_p[1:, :K].sigmoid().sum()


def without_gradient(z: Tensor, w: Tensor, y: Tensor) -> Any:
    log_p = F.log_softmax(z, -1)
    with torch.no_grad():
        part = log_p[:, :K].sigmoid()
    return -(picked(log_p, y) * part).mean()


LEFT = [most, returned_too, edited, of_no_loss, of_some_rows, without_gradient]


@pytest.mark.parametrize("f", LEFT)
def test_what_is_left_is_right(f: Callable[..., Any]) -> None:
    backend, args = Rewritten(min_vocab=20), given()
    check_numbers(run(torch.compile(f, backend=backend, fullgraph=True), args), f, args)
    (graph,) = backend.final
    assert not [n for n in graph.graph.nodes if n.target == torch.ops.aten.sub.Tensor]
