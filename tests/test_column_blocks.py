"""Losses whose classes come in blocks, with a maximum and a sum carried from one to the next: all columns."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from harness import Graphs, Rewritten, compile_without_codegen
from head_cases import counts
from pairwise import EVERYTHING
from reference import assert_fair
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule

from inductor_ce.ops.operators import ROW_STATS
from inductor_ce.rewriting import column_blocks
from inductor_ce.rewriting.column_blocks import join_blocks

N, D, V, C = 24, 8, 60, 16
STARTS = range(0, V, C)
Loss = Callable[..., Any]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states, a weight, a bias, and labels: the first and the last of each block, and -100."""
    torch.manual_seed(7)
    y = torch.randint(V, (N,))
    edges = [-100, *STARTS, *(start - 1 for start in STARTS[1:]), V - 1]
    y[: len(edges)] = torch.tensor(edges)
    h, W, b = (torch.randn(N, D), torch.randn(V, D), torch.randn(V))
    return *(x.to(dtype).requires_grad_() for x in (h, W, b)), y


def mean(rows: Tensor, y: Tensor) -> Tensor:
    return (rows * (y != -100)).sum() / (y != -100).sum()


def picked_in(z: Tensor, y: Tensor, start: int, before: Tensor) -> Tensor:
    inside = (y >= start) & (y < start + z.shape[-1])
    column = (y - start).clamp(0, z.shape[-1] - 1)
    return torch.where(inside, z.gather(-1, column[:, None])[:, 0], before)


# Spellings of what is carried


def online(h, W, b, y):
    m, s, picked = torch.full((N,), -math.inf, dtype=h.dtype), h.new_zeros(N), h.new_zeros(N)
    for start, w in zip(STARTS, W.split(C), strict=True):
        z = h @ w.T
        m_new = torch.maximum(m, z.amax(-1))
        s = s * torch.exp(m - m_new) + torch.exp(z - m_new[:, None]).sum(-1)
        m, picked = m_new, picked_in(z, y, start, picked)
    return mean(m + s.log() - picked, y)


def held_maximum(h, W, b, y):
    m, s, picked = torch.full((N, 1), -1e30, dtype=h.dtype), torch.zeros(N, 1, dtype=h.dtype), 0
    for start in STARTS:
        z = F.linear(h, W[start : start + C], b[start : start + C])
        top = torch.maximum(z.detach().max(dim=-1, keepdim=True).values, m)
        s = (m - top).exp() * s + (z - top).exp().sum(dim=-1, keepdim=True)
        m = top
        inside = torch.logical_and(y >= start, y < start + z.shape[1])
        column = torch.where(inside, y - start, 0).unsqueeze(1)
        picked = picked + z.gather(1, column).squeeze(1) * inside
    return mean(torch.log(s).squeeze(1) - (picked - m.squeeze(1)), y)


def without_a_gradient_to_the_maximum(h, W, b, y):
    """The first block apart; the references without a gradient of their own."""
    first, *others = (W * 0.5).chunk(4)
    z = F.linear(h, first)
    with torch.no_grad():
        m = z.max(-1)[0]
    s = torch.sum(torch.exp(z - m.unsqueeze(-1)), -1)
    picked = picked_in(z, y, 0, torch.zeros_like(s))
    for i, w in enumerate(others, start=1):
        z = F.linear(h, w)
        with torch.no_grad():
            m_new = torch.maximum(m, z.max(-1)[0])
            scale = torch.exp(m - m_new)
        s = s * scale + torch.sum(torch.exp(z - m_new.unsqueeze(-1)), -1)
        m, picked = m_new, picked_in(z, y, i * len(first), picked)
    return mean(torch.log(s) + m - picked, y)


def logaddexp(h, W, b, y):
    total, label = h.new_full((N,), -math.inf), h.new_zeros(N)
    for start in STARTS:
        z = (h @ W.narrow(0, start, min(C, V - start)).t() + b[start : start + C]) / 0.7
        total = torch.logaddexp(total, torch.logsumexp(z, -1))
        outside = (y < start) | (y >= start + C)
        column = (y - start).masked_fill(outside, 0)
        label = label + z.gather(-1, column[:, None]).squeeze(-1).masked_fill(outside, 0.0)
    return mean(total - label, y)


def stacked(h, W, b, y):
    z = F.linear(h, W, b).split(C, -1)
    lse = torch.logsumexp(torch.stack([torch.logsumexp(part, -1) for part in z]), 0)
    label = sum(picked_in(part, y, start, torch.zeros(())) for start, part in zip(STARTS, z, strict=True))
    return mean(lse - label, y)


def concatenated_statistics(h, W, b, y):
    """The statistics of all blocks side by side, and a soft cap."""
    z = [20 * torch.tanh(h @ w.t() / 20) for w in W.split(C)]
    lse = torch.cat([part.logsumexp(-1, keepdim=True) for part in z], -1).logsumexp(-1)
    label = torch.full_like(lse, 0.0)
    for start, part in zip(STARTS, z, strict=True):
        label = picked_in(part, y, start, label)
    return mean(lse - label, y)


def in_place(h, W, b, y):
    m, s = torch.full((N,), -math.inf, dtype=h.dtype), torch.zeros(N, dtype=h.dtype)
    label = torch.zeros(N, dtype=h.dtype)
    for i, w in enumerate(W.split(C)):
        z = h @ w.T
        m_new = torch.maximum(m, z.detach().amax(-1))
        s.mul_(torch.exp(m - m_new)).add_(torch.exp(z - m_new[:, None]).sum(-1))
        m.copy_(m_new)
        block = y // C == i
        label += z.gather(-1, (y - i * C).clamp(0, z.shape[-1] - 1)[:, None])[:, 0].masked_fill(~block, 0)
    return mean(m + s.log() - label, y)


def two_passes(h, W, b, y):
    """The maximum over all blocks first."""
    z = F.linear(h, W).chunk(4, dim=-1)
    with torch.no_grad():
        m = z[0].amax(-1)
        for part in z[1:]:
            m = torch.max(m, part.amax(-1))
    s = sum(torch.exp(part - m[:, None]).sum(-1) for part in z)
    label, start = torch.zeros(N, dtype=h.dtype), 0
    for part in z:
        label = picked_in(part, y, start, label)
        start += part.shape[-1]
    return mean(torch.log(s) - label + m, y)


ONE_PRODUCT = [
    online,
    held_maximum,
    without_a_gradient_to_the_maximum,
    logaddexp,
    stacked,
    concatenated_statistics,
    in_place,
    two_passes,
]


@pytest.mark.parametrize("f", ONE_PRODUCT, ids=lambda f: f.__name__)
def test_blocks_of_one_weight_are_a_head(f: Loss):
    """In chunks of tokens: no block of all rows is made, and so none is saved for the backward."""
    compiled, graphs = compile_without_codegen(f, strategy="token_chunks", memory_budget=0.9)
    check(f, compiled, inputs())
    assert counts() == {"token_chunks": 1}
    assert blocks_of_all_rows(graphs) == []


def blocks_of_all_rows(graphs: Graphs) -> list[str]:
    sizes = [(node, getattr(node.meta.get("val"), "shape", ())) for node in graphs.nodes]
    return [str(node) for node, size in sizes if len(size) == 2 and size[0] == N and size[1] in (V, C, V % C)]


def check(f: Loss, ours: Loss, given: tuple[Tensor, ...]) -> None:
    doubled = tuple(x.double() if x.is_floating_point() else x for x in given)
    compared = measured(ours, given), measured(f, given), measured(f, doubled)
    for mine, naive, exact in zip(*compared, strict=True):
        assert (mine is None) == (naive is None)
        if mine is not None:
            assert_fair(mine, naive, exact)


def measured(f: Loss, given: tuple[Tensor, ...]) -> list[Tensor | None]:
    """All results, and gradients for upstream gradients of their own."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in given]
    results = f(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    torch.autograd.backward(
        [r for r in results if r.requires_grad],
        [u for r, u in zip(results, upstream, strict=True) if r.requires_grad],
    )
    return [*(r.detach() for r in results), *(x.grad for x in leaves)]


# All ways to write each part of such a loss, together

SIZES = {
    "even": [15] * 4,
    "the last is shorter": [16, 16, 16, 12],
    "of any": [7, 30, 20, 3],
    "many": [4] * 15,
}

Parts = Callable[[Tensor, Tensor, Tensor, list[int]], list[Tensor]]


def bounds(sizes: list[int]) -> list[tuple[int, int]]:
    return [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


PRODUCTS: dict[str, Parts] = {
    "linear": lambda h, W, b, n: [F.linear(h, W[i:j], b[i:j]) for i, j in bounds(n)],
    "split": lambda h, W, b, n: [F.linear(h, w, bias=c) for w, c in zip(W.split(n), b.split(n), strict=True)],
    "transposed": lambda h, W, b, n: [h @ w for w in W.t().split(n, 1)],
    "transposed each": lambda h, W, b, n: [torch.mm(h, w.transpose(0, 1)) + 0.5 for w in W.split(n)],
    "narrow": lambda h, W, b, n: [-torch.matmul(h, W.narrow(0, i, j - i).T) / 0.7 for i, j in bounds(n)],
    "each hidden": lambda h, W, b, n: [
        h.view(4, -1, D).view(N, D) * 2 @ W[i:j].T + b[i:j] for i, j in bounds(n)
    ],
    "addmm": lambda h, W, b, n: [torch.addmm(b[i:j], h, W[i:j].t()) for i, j in bounds(n)],
    "einsum each": lambda h, W, b, n: [torch.einsum("nd,vd->nv", h, W[i:j]) for i, j in bounds(n)],
    "einsum": lambda h, W, b, n: list(torch.einsum("nd,vd->nv", h, W).split(n, -1)),
    "a scale for each row": lambda h, W, b, n: [h @ w.T * h[:, :1] for w in W.split(n)],
    "a soft cap": lambda h, W, b, n: [3 * torch.tanh(F.linear(h, w) / 3.0) for w in W.split(n)],
    "the last classes": lambda h, W, b, n: [h @ W[i:j].T for i, j in bounds(n)[1:]],
}


def by_maximum(z: list[Tensor]) -> Tensor:
    m = z[0].amax(-1, keepdim=True)
    s = torch.exp(z[0] - m).sum(-1, keepdim=True)
    for part in z[1:]:
        m_new = torch.maximum(m, part.max(-1, keepdim=True)[0])
        s, m = s * (m - m_new).exp() + (part - m_new).exp().sum(-1, keepdim=True), m_new
    return (s.log() + m).squeeze(-1)


def by_merging(z: list[Tensor]) -> Tensor:
    m, s = z[0].new_full((N,), -math.inf), z[0].new_zeros(N)
    for part in z:
        top = part.detach().amax(-1)
        own = (part - top.unsqueeze(-1)).exp().sum(-1)
        m_new = torch.maximum(top, m)
        s = torch.exp(top - m_new) * own + torch.exp(m - m_new) * s
        m = m_new
    return m + torch.log(s)


def by_normalisers(z: list[Tensor]) -> Tensor:
    """Each block's own, under the largest of them."""
    each = [part.logsumexp(-1) for part in z]
    top = torch.stack(each, -1).amax(-1)
    return sum(torch.exp(lse - top) for lse in each).log() + top


def by_addition(z: list[Tensor]) -> Tensor:
    total = torch.logsumexp(z[0], 1)
    for part in z[1:]:
        total = torch.logaddexp(torch.logsumexp(part, 1), total)
    return total


CARRIED = {f.__name__: f for f in (by_maximum, by_merging, by_normalisers, by_addition)}


def where(gathered: Tensor, inside: Tensor, before: Tensor) -> Tensor:
    return torch.where(inside, gathered, before)


def where_not(gathered: Tensor, inside: Tensor, before: Tensor) -> Tensor:
    return torch.where(~inside, before, gathered)


def times(gathered: Tensor, inside: Tensor, before: Tensor) -> Tensor:
    return before + inside.to(gathered.dtype) * gathered


def filled(gathered: Tensor, inside: Tensor, before: Tensor) -> Tensor:
    return gathered.masked_fill(inside.logical_not(), 0) + before


CHOSEN = {f.__name__: f for f in (where, where_not, times, filled)}


@pytest.mark.parametrize("seed", range(60 if EVERYTHING else 16))
def test_any_parts_together(seed: int):
    choose = random.Random(seed)
    product, sizes = choose.choice(list(PRODUCTS)), choose.choice(list(SIZES))
    carry, chosen = choose.choice(list(CARRIED)), choose.choice(list(CHOSEN))
    in_total, offset = choose.random() < 0.5, choose.choice([0, 0, 3])
    not_padding = choose.random() < 0.5
    first = SIZES[sizes][0] if product == "the last classes" else 0

    def f(h, W, b, y):
        z = PRODUCTS[product](h, W, b, SIZES[sizes])
        lse, label, start = CARRIED[carry](z), h.new_zeros(N), first + offset
        for part in z:
            local = y - start
            inside = (local >= 0) & (local < part.shape[-1])
            inside = inside & (y != -100) if not_padding else inside
            gathered = part.gather(-1, local.clamp(0, part.shape[-1] - 1)[:, None])[:, 0]
            label = CHOSEN[chosen](gathered, inside, label)
            start += part.shape[-1]
        return (sum(part.sum(-1) for part in z) if in_total else 0) + 2 * lse, label

    h, W, b, y = inputs()
    compiled, found = joined(f)
    check(f, compiled, (h, W, b, torch.where(y < 0, y, y + offset)))
    assert found == [True], (product, sizes, carry, chosen)


# Dimensions, types, labels that are no classes


def of_sequences(h, W, b, y):
    """[B, S, V], in 16 bits, with float32 statistics."""
    h, y = h.view(4, N // 4, D), y.view(4, N // 4)
    total, label = None, 0.0
    for start in STARTS:
        z = (h @ W[start : start + C].mT).float() if h.dtype != torch.float64 else h @ W[start : start + C].mT
        lse = z.logsumexp(-1)
        total = lse if total is None else torch.logaddexp(total, lse)
        inside = (start <= y) & (y <= start + z.shape[-1] - 1)
        column = torch.where(~inside, 0, y - start)[..., None]
        label = torch.where(inside, z.gather(-1, column).squeeze(-1), label)
    return mean(total - label, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_of_sequences(dtype: torch.dtype):
    compiled, _ = compile_without_codegen(of_sequences, strategy="token_chunks", memory_budget=0.9)
    check(of_sequences, compiled, inputs(dtype))
    assert counts() == {"token_chunks": 1}


def beside_an_accuracy(h, W, b, y):
    """Blocks of logits that something else reads whole."""
    z, lse = F.linear(h, W, b), None
    for part in z.split(C, -1):
        lse = part.logsumexp(-1) if lse is None else torch.logaddexp(lse, part.logsumexp(-1))
    nll = lse - z.gather(-1, y.clamp(min=0)[:, None])[:, 0]
    return mean(nll, y), (z.argmax(-1) == y).to(h.dtype).mean()


def under_autocast(h, W, b, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = [F.linear(h, w).float() for w in W.split(C)]
        lse = torch.stack([part.logsumexp(-1) for part in z]).logsumexp(0)
    return mean(lse - (h * W[y.clamp(min=0)]).sum(-1), y)


@pytest.mark.parametrize("f", [beside_an_accuracy, under_autocast], ids=lambda f: f.__name__)
def test_of_a_program(f: Loss):
    compiled, _ = compile_without_codegen(f, strategy="token_chunks", memory_budget=0.9)
    check(f, compiled, inputs())
    assert counts() == {"token_chunks": 1}


def test_any_number_of_rows():
    def f(h, W, b, y):
        total = h.new_full((h.shape[0],), -math.inf)
        label = h.new_zeros(h.shape[0])
        for start in STARTS:
            z = F.linear(h, W[start : start + C])
            total = torch.logaddexp(total, z.logsumexp(-1))
            label = picked_in(z, y, start, label)
        return mean(total - label, y)

    compiled, graphs = compile_without_codegen(f, strategy="token_chunks", memory_budget=0.9)
    h, W, b, y = inputs()
    for rows in (N, N - 4, N - 8):
        check(f, compiled, (h[:rows], W, b, y[:rows]))
    assert counts() == {"token_chunks": 2}
    assert len(graphs.final) == 4


def of_any_label(h, W, b, y):
    """Those of no block have 0; below the first block they have its first column, as they are clamped."""
    m, s, label = h.new_full((N,), -math.inf), h.new_zeros(N), h.new_zeros(N)
    z = F.linear(h, W)
    below = z.new_zeros(N)
    for start, part in zip(STARTS, z.split(C, -1), strict=True):
        m_new = torch.maximum(m, part.amax(-1))
        s = s * torch.exp(m - m_new) + torch.exp(part - m_new[:, None]).sum(-1)
        m = m_new
        column = (y - start).clamp(0, part.shape[-1] - 1)[:, None]
        gathered = part.gather(-1, column)[:, 0]
        label = picked_in(part, y, start, label)
        below = torch.where((y < start + C) & (y >= start) if start else y < C, gathered, below)
    return m + s.log() - label, below


def test_labels_that_are_no_classes():
    *given, y = inputs()
    y[:6] = torch.tensor([-1, -100, V, V + 3, V + 4, -7])
    rewritten = Rewritten()
    check(of_any_label, torch.compile(of_any_label, backend=rewritten), (*given, y))
    assert rewritten.count(ROW_STATS) == 1


def test_a_first_block_that_is_masked_and_rows_that_are():
    """exp(-inf - -inf) is NaN in eager; here lse is that of the other columns, -inf where there are none."""

    def f(h, W, b, y):
        z = (h @ W.T).masked_fill(b > 0, -math.inf)
        m, s = h.new_full((N,), -math.inf), h.new_zeros(N)
        for part in z.split(C, -1):
            m_new = torch.maximum(m, part.amax(-1))
            s = s * torch.exp(m - m_new) + torch.exp(part - m_new[:, None]).sum(-1)
            m = m_new
        return m + s.log()

    h, W, b, y = inputs()
    with torch.no_grad():
        b.copy_(torch.where(torch.arange(V) < C, 1.0, -1.0))
        assert f(h, W, b, y).isnan().all()
        compiled, found = joined(f)
        torch.testing.assert_close(compiled(h, W, b, y), (h @ W[C:].T).logsumexp(-1))
        assert (compiled(h, W, torch.ones_like(b), y) == -math.inf).all()
        assert found == [True, True]  # the second has no gradient


def test_logits_that_are_arguments():
    def f(first, second, y):
        label = picked_in(second, y, C, picked_in(first, y, 0, first.new_zeros(N)))
        return mean(torch.logaddexp(first.logsumexp(-1), second.logsumexp(-1)) - label, y)

    compiled, found = joined(f)
    check(f, compiled, (torch.randn(N, C), torch.randn(N, C), torch.randint(2 * C, (N,))))
    assert found == [True]


def test_what_is_made_without_a_gradient_has_none():
    """And is left where it would be made where gradients are taken, as of given logits."""

    def f(z, h, y):
        with torch.no_grad():
            lse = None
            for part in z.split(C, -1):
                lse = part.logsumexp(-1) if lse is None else torch.logaddexp(lse, part.logsumexp(-1))
        return (lse * h[:, 0]).sum() + z.square().sum()

    compiled, _ = joined(f)
    check(f, compiled, (torch.randn(N, V), torch.randn(N, D), torch.randint(V, (N,))))


# Blocks of several tensors


def of_two_weights(h, W, b, y):
    """An adaptive vocabulary: the tail has a projection of its own."""
    z = [F.linear(h, W[: 2 * C]), F.linear(h * 0.5, W[2 * C :], b[2 * C :])]
    lse = torch.logaddexp(z[0].logsumexp(-1), z[1].logsumexp(-1))
    label = picked_in(z[1], y, 2 * C, picked_in(z[0], y, 0, h.new_zeros(N)))
    return mean(lse - label, y)


def blocks_apart(h, W, b, y):
    """Of one weight, which has others between."""
    return mean(by_addition([F.linear(h, W[i : i + C]) for i in (0, 2 * C, C // 2)]), y)


def looked_at(h, W, b, y):
    """By views."""
    lse = by_addition([F.linear(h, w) for w in W.split(C)])
    return mean(lse, y), lse.view(4, -1)[1:].square().sum()


@pytest.mark.parametrize("f", [blocks_apart, looked_at], ids=lambda f: f.__name__)
def test_is_joined(f: Loss):
    compiled, found = joined(f)
    check(f, compiled, inputs())
    assert found == [True]


def test_few_blocks_of_other_products_are_combined_by_their_statistics():
    rewritten = Rewritten()
    check(of_two_weights, torch.compile(of_two_weights, backend=rewritten), inputs())
    assert rewritten.count(ROW_STATS) == 2
    assert rewritten.count(torch.cat) == 0


# What is left


def carried(
    h: Tensor,
    W: Tensor,
    y: Tensor,
    starts: Sequence[int] = STARTS,
    scale: Callable[[int], float] = lambda i: 1.0,
    inside: Callable[[Tensor, int], Tensor] = lambda y, start: (y >= start) & (y < start + C),
    column: Callable[[Tensor, int], Tensor] = lambda y, start: y - start,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """(m before the last block, m, s, the logits at labels, all logits)"""
    m, s, label, logits = h.new_full((N,), -math.inf), h.new_zeros(N), h.new_zeros(N), []
    before = m
    for i, start in enumerate(starts):
        z = F.linear(h * scale(i), W[start : start + C])
        m_new = torch.maximum(m, z.amax(-1))
        s = s * torch.exp(m - m_new) + torch.exp(z - m_new[:, None]).sum(-1)
        before, m = m, m_new
        gathered = z.gather(-1, column(y, start).clamp(0, z.shape[-1] - 1)[:, None])[:, 0]
        label = torch.where(inside(y, start), gathered, label)
        logits.append(z)
    return before, m, s, label, logits


def understood(h, W, b, y):
    _, m, s, label, _ = carried(h, W, y)
    return mean(m + s.log() - label, y)


def an_old_maximum(h, W, b, y):
    before, _, s, label, _ = carried(h, W, y)
    return mean(before + s.log() - label, y)


def no_maximum(h, W, b, y):
    _, _, s, label, _ = carried(h, W, y)
    return mean(s.log() - label, y)


def a_block_twice(h, W, b, y):
    _, m, s, label, z = carried(h, W, y)
    s = s + torch.exp(z[1] - m[:, None]).sum(-1)
    return mean(m + s.log() - label, y)


def a_block_left_out_of_the_labels(h, W, b, y):
    _, m, s, label, _ = carried(h, W, y, inside=lambda y, start: (y >= start) & (y < start + C) & (y < 2 * C))
    return mean(m + s.log() - label, y)


def a_label_in_no_block(h, W, b, y):
    """The first column of each block is nobody's."""
    _, m, s, label, _ = carried(h, W, y, inside=lambda y, start: (y > start) & (y < start + C))
    return mean(m + s.log() - label, y)


def a_column_too_far(h, W, b, y):
    _, m, s, label, _ = carried(h, W, y, column=lambda y, start: y - start + 1)
    return mean(m + s.log() - label, y)


def a_column_of_some_blocks_too_far(h, W, b, y):
    label, even = h.new_zeros(N), y // 2 * 2
    for i, start in enumerate(STARTS):
        z = F.linear(h, W[start : start + C])
        total = z.logsumexp(-1) if i == 0 else torch.logaddexp(total, z.logsumexp(-1))  # noqa: F821
        inside = (even >= start) & (even < start + C)
        column = torch.where(inside, even - start + (1 if i == 2 else 0), 0)
        label = torch.where(inside, z.gather(-1, column[:, None])[:, 0], label)
    return mean(total - label, y)


def hidden_states_of_their_own(h, W, b, y):
    starts = range(0, V, C // 2)
    m, s = h.new_full((N,), -math.inf), h.new_zeros(N)
    for i, start in enumerate(starts):
        z = F.linear(h + i, W[start : start + C // 2])
        m_new = torch.maximum(m, z.amax(-1))
        s = s * torch.exp(m - m_new) + torch.exp(z - m_new[:, None]).sum(-1)
        m = m_new
    return mean(m + s.log(), y)


def the_sum_is_returned(h, W, b, y):
    _, m, s, label, _ = carried(h, W, y)
    return mean(m + s.log() - label, y), s


def the_maximum_is_returned(h, W, b, y):
    _, m, s, label, _ = carried(h, W, y)
    return mean(m + s.log() - label, y), m


def a_block_is_returned(h, W, b, y):
    _, m, s, label, z = carried(h, W, y)
    return mean(m + s.log() - label, y), z[1]


def a_maximum_held_on_one_side(h, W, b, y):
    """Its gradient does not cancel."""
    z = F.linear(h, W).split(C, -1)
    m = z[0].amax(-1)
    for part in z[1:]:
        m = torch.maximum(m, part.amax(-1))
    s = sum(torch.exp(part - m.detach()[:, None]).sum(-1) for part in z)
    return mean(m + s.log(), y)


def a_scale_without_its_gradient(h, W, b, y):
    m, s = h.new_full((N,), -math.inf), h.new_zeros(N)
    for start in STARTS:
        z = F.linear(h, W[start : start + C])
        m_new = torch.maximum(m, z.amax(-1))
        with torch.no_grad():
            scale = torch.exp(m - m_new)
        s = s * scale + torch.exp(z - m_new[:, None]).sum(-1)
        m = m_new
    return mean(m + s.log(), y)


def a_weight_that_changes(h, W, b, y):
    h, W, total = h.detach(), W.detach().clone(), h.new_full((N,), -math.inf)
    for start in range(0, V, C // 2):
        stop = start + C // 2
        total = torch.logaddexp(total, F.linear(h, W[start:stop], b[start:stop]).logsumexp(-1))
        W.mul_(1.5)
    return mean(total, y)


def a_normaliser_that_is_changed_behind_its_view(h, W, b, y):
    total = h.new_full((N,), -math.inf)
    for start in STARTS:
        total = torch.logaddexp(total, F.linear(h, W[start : start + C]).logsumexp(-1))
    halves = total.view(2, -1)
    total.add_(1.0)
    return halves.square().sum()


def labels_of_bytes(h, W, b, y):
    """Less where a block begins, they may come round."""
    small = y.clamp(min=0).to(torch.uint8)
    m, s, label = carried(h, W, small, column=lambda y, start: (y - start).long())[1:4]
    return mean(m + s.log() - label, y)


def a_sum_that_is_changed(h, W, b, y):
    _, m, s, label, _ = carried(h, W, y)
    s[:3] += 1
    return mean(m + s.log() - label, y)


LEFT = [
    an_old_maximum,
    no_maximum,
    a_block_twice,
    a_block_left_out_of_the_labels,
    a_label_in_no_block,
    a_column_too_far,
    a_column_of_some_blocks_too_far,
    hidden_states_of_their_own,
    the_sum_is_returned,
    the_maximum_is_returned,
    a_block_is_returned,
    a_maximum_held_on_one_side,
    a_scale_without_its_gradient,
    a_weight_that_changes,
    a_sum_that_is_changed,
    a_normaliser_that_is_changed_behind_its_view,
    labels_of_bytes,
]


def joined(f: Loss) -> tuple[Loss, list[bool]]:
    """f, and whether blocks of its graphs were joined, once it has run."""
    found: list[bool] = []

    def compiler(gm: GraphModule, _: Any) -> Any:
        before = str(gm.graph)
        with enable_python_dispatcher():
            join_blocks(gm.graph, 2)
        found.append(str(gm.graph) != before)
        gm.graph.lint()
        gm.recompile()
        return gm.forward

    return torch.compile(f, backend=compiler), found


@pytest.mark.parametrize("f", [understood, *LEFT], ids=lambda f: f.__name__)
def test_what_is_left(f: Loss):
    compiled, found = joined(f)
    check(f, compiled, inputs())
    assert found == [f is understood]


def test_fewer_classes_than_are_worth_it():
    rewritten = Rewritten(min_vocab=V + 1)
    check(understood, torch.compile(understood, backend=rewritten), inputs())
    assert not rewritten.changed


def test_a_graph_without_any_is_not_read():
    with mock.patch.object(column_blocks, "read_blocks") as read:
        compiled, _ = compile_without_codegen(lambda h, W, b, y: F.cross_entropy(F.linear(h, W, b), y))
        compiled(*inputs())
        assert not read.called
        torch.compile(understood, backend=Rewritten())(*inputs())
        assert read.called
