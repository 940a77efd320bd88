"""The log of the probability of some classes, by a normaliser over their log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gallery import check_numbers, run
from harness import Rewritten, compile_without_codegen, misses, sites
from torch import Tensor

from inductor_ce import ops

N, V = 6, 20
EMPTY = 3  # a row of which no class is left


def given(dtype: torch.dtype = torch.float64, empty: bool = False) -> tuple[Tensor, Tensor]:
    z, candidates = 3 * torch.randn(N, V), torch.rand(N, V) < 0.3
    candidates[:, 2] = True
    candidates[EMPTY] &= not empty
    return z.to(dtype).requires_grad_(), candidates


def filled(z: Tensor, m: Tensor) -> Tensor:
    return z.log_softmax(-1).masked_fill(~m, -math.inf).logsumexp(-1)


def chosen(z: Tensor, m: Tensor) -> Tensor:
    return torch.where(m, F.log_softmax(z, -1), -math.inf).logsumexp(-1, keepdim=True)


def chosen_otherwise(z: Tensor, m: Tensor) -> Tensor:
    return torch.where(~m, torch.tensor(-math.inf, dtype=z.dtype), F.log_softmax(z, -1)).logsumexp(-1)


def added(z: Tensor, m: Tensor) -> Tensor:
    return (F.log_softmax(z / 2, -1) + m.log()).logsumexp(-1)


def by_hand(z: Tensor, m: Tensor) -> Tensor:
    log_p = z - z.logsumexp(-1, keepdim=True)
    return torch.logsumexp(0.3 + log_p.masked_fill(~m, -math.inf), -1).square().mean()


def beside_a_loss(z: Tensor, m: Tensor) -> Tensor:
    log_p = F.log_softmax(z, -1)
    return F.nll_loss(log_p, m.int().argmax(-1)) - log_p.masked_fill(~m, -math.inf).logsumexp(-1).mean()


def rewritten(f: Callable[..., Any], args: tuple[Tensor, ...]) -> Rewritten:
    """f with its losses replaced, eager's in values and gradients, where they are NaN too."""
    backend = Rewritten()
    ours, exact = run(torch.compile(f, backend=backend, fullgraph=True), args), run(f, args)
    for mine, true in zip(ours.results + ours.gradients, exact.results + exact.gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-14, equal_nan=True)
    return backend


def is_difference(ours: Rewritten) -> bool:
    return ours.count(torch.ops.aten.sub.Tensor) > 0


FUNCTIONS = [filled, chosen, chosen_otherwise, added, by_hand, beside_a_loss]


@pytest.mark.parametrize("f", FUNCTIONS)
@pytest.mark.parametrize("empty", [False, True])
def test_numbers(f: Callable[..., Tensor], empty: bool) -> None:
    """A row of which nothing is left has eager's -inf, and eager's gradient."""
    ours = rewritten(f, given(empty=empty))
    assert ours.count(ops.ROW_STATS) == 2
    assert is_difference(ours)
    assert not ours.report.misses


@pytest.mark.parametrize("f", [filled, added])
@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_as_exact_as_eager(f: Callable[..., Tensor], offset: float) -> None:
    """What is added to all logits is gone before it is rounded, and what underflows is no zero."""
    z, m = given(torch.float32)
    z = torch.where(m, z - 150, z).detach().add(offset).requires_grad_()
    compiled, _ = compile_without_codegen(f)
    check_numbers(run(compiled, (z, m)), f, (z, m))
    assert sites() == 2


def test_odd_rows() -> None:
    z, m = given()
    m[4, 1], m[5, 1] = True, False
    with torch.no_grad():
        z[0, 3], z[1], z[2, 5], z[4:, 1] = -math.inf, -math.inf, math.nan, math.inf
    assert is_difference(rewritten(filled, (z, m)))


def kept(z: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(z, -1)
    return log_p, log_p.masked_fill(~m, -math.inf).logsumexp(-1)


def read_elsewhere(z: Tensor, m: Tensor) -> Tensor:
    return filled(z, m) + z.sigmoid().sum(-1)


def filled_with_a_number(z: Tensor, m: Tensor) -> Tensor:
    return z.log_softmax(-1).masked_fill(~m, -20.0).logsumexp(-1)


def used_twice(z: Tensor, m: Tensor) -> Tensor:
    log_p = z.log_softmax(-1).masked_fill(~m, -math.inf)
    return log_p.logsumexp(-1) + log_p.exp().square().sum(-1)


def along_the_rows(z: Tensor, m: Tensor) -> Tensor:
    return z.log_softmax(-1).masked_fill(~m, -math.inf).logsumexp(0)


def of_a_scaled_one(z: Tensor, m: Tensor) -> Tensor:
    return (2 * z.log_softmax(-1)).masked_fill(~m, -math.inf).logsumexp(-1)


def a_mask_edited_between(z: Tensor, m: Tensor) -> Tensor:
    with torch.no_grad():
        left_out = ~m
        log_p = z.log_softmax(-1).masked_fill(left_out, -math.inf)
        left_out.fill_(False)
        told = log_p.logsumexp(-1)
    return told + z.logsumexp(-1)


def logits_edited_between(z: Tensor, m: Tensor) -> Tensor:
    with torch.no_grad():
        x = z + 0
        whole = x.view(-1)
        log_p = x.log_softmax(-1).masked_fill(~m, -math.inf)
        x.mul_(2)
        told = log_p.logsumexp(-1) + 0 * whole[0]
    return told + z.logsumexp(-1)


LEFT = [kept, read_elsewhere, filled_with_a_number, used_twice, along_the_rows, of_a_scaled_one]


@pytest.mark.parametrize("f", [*LEFT, a_mask_edited_between, logits_edited_between])
def test_what_is_left(f: Callable[..., Tensor]) -> None:
    assert not is_difference(rewritten(f, given()))


@pytest.mark.parametrize("strategy", ["token_chunks", "vocab_slabs"])
def test_heads_in_pieces(strategy: str) -> None:
    """Both normalisers are of one product, whose logits are never all in memory."""

    def f(h: Tensor, W: Tensor, m: Tensor) -> Tensor:
        return -filled(F.linear(h, W), m).mean()

    _, m = given()
    args = torch.randn(N, 8).double().requires_grad_(), torch.randn(V, 8).double().requires_grad_(), m
    compiled, graphs = compile_without_codegen(f, strategy=strategy, memory_budget=0.5)
    ours, exact = run(compiled, args), run(f, args)
    for mine, true in zip(ours.results + ours.gradients, exact.results + exact.gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-14)
    assert (sites(), misses()) == (2, 0)
    assert graphs.pieces > 2
