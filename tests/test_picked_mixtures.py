"""Labels picked after probabilities are added or averaged, as of ensembles and mixtures of softmaxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gallery import run
from harness import Rewritten, compile_without_codegen, counters
from test_divergences import check, rewritten
from test_head_memory import largest
from torch import Tensor

from inductor_ce import ops

N, K, V = 6, 3, 20


def given() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of several mixtures, numbers of rows, and labels."""
    zs, gates = torch.randn(N, K, V).double().requires_grad_(), torch.randn(N, K).double().requires_grad_()
    return zs, gates, torch.randint(V, (N,)), torch.rand(N, V).double()


def averaged(z: Tensor) -> Tensor:
    return (z[:, 0].softmax(-1) + F.softmax(z[:, 1], -1)) / 2


def ensemble(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return F.nll_loss(averaged(z).log(), y)


def ignoring(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return F.nll_loss(torch.log(averaged(z)), torch.where(y < 5, -1, y), ignore_index=-1, reduction="none")


def gathered_then_log(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return -(averaged(z).gather(1, y[:, None]) + 1e-9).log().sum()


def indexed(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return -averaged(z).clamp(min=1e-8)[torch.arange(N), y - V * (y > 9)].log()


def of_logarithms(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    both = torch.logaddexp(z[:, 0].log_softmax(-1), z[:, 1].log_softmax(-1))
    return both.view(2, -1, V).gather(2, y.view(2, -1, 1)).mean()


def pointer(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    generates = torch.sigmoid(gates[:, :1])
    p = generates * z[:, 0].softmax(-1) + (1 - generates) * z[:, 1].softmax(-1)
    return -p.gather(1, torch.stack([y, y.flip(0)], 1)).log().mean()


def steps(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    """Each part of a stack has labels of its own, one part twice, as a decoder's steps."""
    first, second = z[:, 0].log_softmax(-1), z[:, 1].softmax(-1).log()
    labels = torch.stack([y, y.flip(0), y.roll(1)], 1)
    return torch.stack([first, second, first], 1).gather(2, labels.unsqueeze(-1)).sum(1)


def stacked(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return F.nll_loss(torch.stack([z[:, 0].softmax(-1), z[:, 1].softmax(-1)]).mean(0).log(), y)


def mixture_of_softmaxes(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    p = (z.softmax(-1) * gates.softmax(-1).unsqueeze(2).expand_as(z)).sum(1)
    return F.nll_loss((p + 1e-8).log().view(-1, V), y.view(-1), reduction="sum")


def raised_in_place(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    """An epsilon is added to the mixture itself, whose name is read after that."""
    flipped = y.flip(0)
    p = (z.softmax(-1) * gates.softmax(-1).unsqueeze(2)).sum(1)
    p.add_(1e-2).div_(gates.exp().sum(-1, keepdim=True))
    p *= 2
    return -p.gather(1, y[:, None]).log().mean() + F.nll_loss(p, flipped)


def raised_after_half(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    """It is read as it was before the edit, and as it is after."""
    p = averaged(z)
    before = p * 2
    p.add_(q)
    return F.nll_loss(before + p.sqrt(), y)


def sources(z: Tensor, v: int = V) -> Tensor:
    """Four words of each row's source, some of them twice, of which some are labels."""
    return (torch.arange(4) // 2 + torch.arange(len(z))[:, None] * 3).remainder(v)


def copied(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    """As of a pointer network whose attention goes to the words of the source."""
    generates, attention = torch.sigmoid(gates[:, :1]), F.softmax(z[:, 1, :4], 1)
    p = (generates * z[:, 0].softmax(-1)).scatter_add(1, sources(z), (1 - generates) * attention)
    y = torch.where(y < V // 2, sources(z)[:, 1], y)
    return -(p.gather(1, y.unsqueeze(1)).squeeze() + 1e-2).log()


def copied_in_place(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    """Several of each place of a batch, to zeros and to what has an edit before."""
    generates = torch.sigmoid(gates[:, 0].view(2, 3, 1))
    zs = z.view(2, 3, K, V)
    attention = zs[:, :, 1, :4].softmax(-1)
    copies = torch.zeros(2, 3, V, dtype=z.dtype).scatter_add_(2, sources(z).view(2, 3, 4), attention)
    p = generates * zs[:, :, 0].softmax(-1) + (1 - generates) * copies
    p.scatter_add_(-1, sources(z).view(2, 3, 4).flip(-1), attention.square()).add_(1e-3)
    labels = torch.cat([y.view(2, 3, 1), sources(z).view(2, 3, 4)], -1)
    return p.gather(-1, labels).log()


def words_of_the_source(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    wider = torch.cat([0.5 * z[:, 0].softmax(-1), q.new_zeros(N, 3)], 1)
    p = wider.scatter_add(1, sources(z, V + 3), gates.softmax(-1).repeat(1, 2)[:, :4] / 2)
    y = torch.where(y < V // 2, sources(z, V + 3)[:, 3], y)
    return -(p.gather(1, y[:, None]) + 1e-3).log().mean()


def copies_beside(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    """Each word of the source is a class by itself, in front and behind, of which some learn."""
    generates, aligned = torch.sigmoid(gates[:, :1]), torch.arange(N).remainder(K).unsqueeze(1)
    front, copies = (1 - generates) * gates.exp(), gates.exp() * (1 - generates)
    scores = torch.cat([front, generates * z[:, 0].softmax(-1), copies], 1)
    behind = scores.gather(1, aligned + K + V)
    return (scores.gather(1, y[:, None] + K) + behind + scores.gather(1, aligned)).log()


FUNCTIONS = [
    *(
        ensemble,
        ignoring,
        gathered_then_log,
        indexed,
        of_logarithms,
        pointer,
        stacked,
        steps,
        mixture_of_softmaxes,
    ),
    *(raised_in_place, raised_after_half, copied, copied_in_place, words_of_the_source, copies_beside),
]
OF_ONE = {mixture_of_softmaxes, raised_in_place, copied, copied_in_place, words_of_the_source, copies_beside}


@pytest.mark.parametrize("f", FUNCTIONS)
def test_numbers(f: Callable[..., Tensor]) -> None:
    ours = rewritten(f, given())
    assert ours.count(ops.ROW_STATS) == 2 - (f in OF_ONE)


def test_no_row_counts() -> None:
    def f(z: Tensor, y: Tensor) -> Tensor:
        return F.nll_loss(averaged(z).log(), y)

    z, y = torch.randn(N, K, V, requires_grad=True), torch.full((N,), -100)
    compiled, _ = compile_without_codegen(f)
    assert compiled(z, y).isnan()
    assert counters["inductor_ce"]["sites"] == 2


def read_whole(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    p = averaged(z)
    return F.nll_loss(p.log(), y) + p.square().sum()


def copied_and_returned(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    p = (0.5 * z[:, 0].softmax(-1)).scatter_add(1, sources(z), z[:, 1, :4])
    return -p.gather(1, y[:, None]).log().mean(), p


def edited_between_picks(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    p = averaged(z)
    first = p[torch.arange(N), y]
    p.add_(0.5)
    return (first / p[torch.arange(N), y]).log().mean()


def topped(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    p = averaged(z)
    return F.nll_loss(p.log(), y), p.detach().topk(2).values


def experts_returned(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    p = (z.softmax(-1) * gates.softmax(-1).unsqueeze(2)).sum(1)
    return F.nll_loss(p.log(), y), p


def experts_averaged(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    log_p = z.softmax(-1).mean(1).add_(1e-3).log()
    return F.nll_loss(log_p, y), log_p


@pytest.mark.parametrize(
    ("f", "kept"),
    [
        *((experts_returned, [True]), (experts_averaged, [True])),
        *((read_whole, [False, False]), (edited_between_picks, [False, False])),
        *((copied_and_returned, [True]), (topped, [True, True])),
    ],
)
def test_a_mixture_that_something_else_reads(f: Callable[..., Any], kept: list[bool]) -> None:
    """It is a sum of entries as well, or is picked twice, or is kept."""
    ours = rewritten(f, given())
    assert [bool(site.kept) for site in ours.report.sites] == kept
    assert not ours.report.misses


def test_a_mixture_whose_gradient_is_of_all_classes_is_left() -> None:
    """Each expert's classes have a gradient of the sum over experts: nothing would be spared."""

    def f(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        loss, p = experts_returned(z, gates, y, q)
        return loss, (p * q).cumsum(-1).square().sum()

    assert rewritten(f, given()).report.misses


def test_a_mixture_without_a_gradient_is_left() -> None:
    def f(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
        return read_whole(z.detach(), gates, y, q) + z.sum()

    assert not rewritten(f, given()).changed


def copied_to_some_rows(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    p = (0.5 * z[:, 0].softmax(-1)).scatter_add(1, sources(z)[:4], q[:, :4])
    return -p.gather(1, y[:, None]).log().mean()


def copied_from_what_is_edited(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    attention = z[:, 1, :4] * 1
    p = (0.5 * z[:, 0].softmax(-1)).scatter_add(1, sources(z), attention)
    attention.mul_(2)
    return p.gather(1, y[:, None]).mean() + attention.sum()


def gates_edited_after(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    g = gates[:, :1] * 1
    p = averaged(z) + g
    g.mul_(0.5)
    return p.gather(1, y[:, None]).mean() + g.mean()


def edited_by_another_name(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    p = averaged(z)
    p.view(-1).add_(0.1)
    return -p.gather(1, y[:, None]).log().mean()


def raised_without_gradient(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    p = averaged(z)
    with torch.no_grad():
        p.mul_(3)
    return -p.gather(1, y[:, None]).sum()


def edited(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    p = averaged(z)
    p[:, 3] = 0.5
    return -p.gather(1, y[:, None]).log().mean()


def weighed_by_what_learns(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    p = averaged(z) * z[:, 2].sigmoid()
    return -p.gather(1, y[:, None]).log().mean()


def of_some_rows(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return -averaged(z).gather(1, y[:4, None]).log().mean()


def weighed_classes(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return F.nll_loss(averaged(z).log(), y, weight=q[0])


LEFT = [
    *(edited, weighed_by_what_learns, of_some_rows, weighed_classes),
    *(copied_to_some_rows, copied_from_what_is_edited, gates_edited_after, edited_by_another_name),
    raised_without_gradient,
]


@pytest.mark.parametrize("f", LEFT)
def test_what_is_left(f: Callable[..., Any]) -> None:
    """Right all the same."""
    ours = rewritten(f, given())
    assert ours.count(torch.gather) == 0


def two_parts(h: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(((F.linear(h, a).softmax(-1) + F.linear(h, b).softmax(-1)) / 2).log(), y)


def a_part_and_copies(h: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """The attention and its gate are made of the hidden states too, and are no losses."""
    generates = torch.sigmoid(h[:, :1])
    p = torch.cat([generates * F.linear(h, a).softmax(-1), h.new_zeros(len(h), 2)], 1)
    attention = (h @ b[:4].t()).softmax(-1)
    p = p.scatter_add(1, sources(h, V + 2), (1 - generates) * attention)
    return -(p.gather(1, y[:, None]) + 1e-12).log().sum() / 7


@pytest.mark.parametrize("f", [two_parts, a_part_and_copies])
def test_heads_in_pieces(f: Callable[..., Tensor]) -> None:
    """Of whose logits none are ever all in memory."""
    h, a, b = (torch.randn(n, 8).double().requires_grad_() for n in (4 * N, V, V))
    args = h, a, b, torch.randint(V, (4 * N,))
    compiled, graphs = compile_without_codegen(f, strategy="token_chunks", memory_budget=0.5)
    ours, exact = run(compiled, args), run(f, args)
    for mine, true in zip(ours.results + ours.gradients, exact.results + exact.gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-14)
    assert counters["inductor_ce"]["sites"] == 1 + (f is two_parts)
    assert graphs.pieces > 1
    assert max(map(largest, graphs.final)) < 4 * N * V


def test_words_outside() -> None:
    """Are an error in eager; here their row alone is NaN."""
    z, words = torch.randn(N, V), torch.arange(N * 2).view(N, 2)
    words[1, 1], words[2, 0] = V, -1

    def f(z: Tensor, words: Tensor, y: Tensor) -> Tensor:
        p = z.softmax(-1).mul(0.5).scatter_add(1, words, torch.full(words.shape, 0.25))
        return p.gather(1, y[:, None]).squeeze(1)

    compiled, _ = compile_without_codegen(f)
    rows = compiled(z.requires_grad_(), words, words[:, 0].clamp(0, V - 1))
    assert rows.isnan().tolist() == [False, True, True, False, False, False]


def test_other_sizes_are_compiled_once() -> None:
    """The rows, the words of their sources, and the classes that these have beyond the vocabulary."""

    def f(z: Tensor, attention: Tensor, words: Tensor, extra: Tensor, y: Tensor) -> Tensor:
        p = torch.cat([0.5 * z.softmax(-1), extra], 1).scatter_add(1, words, attention.softmax(-1) / 2)
        return -(p.gather(1, y[:, None]) + 1e-12).log().mean()

    backend = Rewritten()
    compiled = torch.compile(f, backend=backend, fullgraph=True, dynamic=True)
    for n, words, extra in ((5, 4, 3), (7, 6, 2), (9, 3, 5)):
        z, attention = (torch.randn(n, m).double().requires_grad_() for m in (V, words))
        args = z, attention, torch.randint(V + extra, (n, words)), torch.zeros(n, extra).double()
        args = *args, torch.randint(V + extra, (n,))
        check(run(compiled, args), f, args)
    assert len(backend.final) == 1
    assert backend.count(ops.ROW_STATS) == 1


@pytest.mark.parametrize("f", [copied, words_of_the_source, raised_in_place])
def test_infinite_logits(f: Callable[..., Tensor]) -> None:
    """Labels of probability 0, which the source may have all the same, and a row of nothing but -inf."""
    zs, gates, y, q = given()
    z = zs.detach().clone()
    z[torch.arange(N), 0, y] = z[:, 0, 0] = -torch.inf
    z[4, 0] = -torch.inf
    args = z.requires_grad_(), gates, y, q
    ours, exact = run(torch.compile(f, backend=Rewritten()), args), run(f, args)
    for mine, true in zip(ours.results + ours.gradients, exact.results + exact.gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-14, equal_nan=True)
