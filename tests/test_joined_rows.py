"""Losses of parts of one linear layer's rows: one operator for all of them, and a head in pieces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gallery import check_numbers, run
from harness import Rewritten, compile_without_codegen, misses, sites
from pairwise import in_turns
from torch import Tensor

import inductor_ce
from inductor_ce import ops
from inductor_ce.rewriting import joined_rows

B, S, V, D = 4, 6, 1100, 8

Inputs = tuple[Tensor, Tensor, Tensor]
Loss = Callable[..., Tensor]


def inputs(s: int = S) -> Inputs:
    h = torch.randn(B, s, D, requires_grad=True)
    W = torch.randn(V, D, requires_grad=True)
    y = torch.randint(V, (B, s))
    y[0, :2] = -100
    return h, W, y


def picked(z: Tensor, y: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)


# One operator, by how many losses


def sequence_by_sequence(h, W, y):
    return torch.stack([F.cross_entropy(z, t) for z, t in zip(F.linear(h, W), y, strict=True)]).mean()


def in_a_loop_with_weights(h, W, y):
    z, loss = F.linear(h, W, W[:, 0]) / 0.8, 0
    for i in range(B):
        loss = loss + (i + 1) * F.cross_entropy(z[i].float(), y[i], label_smoothing=0.1)
    return loss / B


def position_by_position(h, W, y):
    z = F.linear(h, W)
    return sum(F.cross_entropy(z[:, i], y[:, i], reduction="sum") for i in range(S)) / (y != -100).sum()


def class_weights(h, W, y):
    z, weight = 9 * torch.tanh(F.linear(h, W) / 9), torch.linspace(0.5, 1.5, V).to(h.dtype)
    return sum(F.cross_entropy(z[i], y[i], weight=weight) for i in range(B))


def first_and_others(h, W, y):
    """Of which the others are all rows, but for the first."""
    z = F.linear(h, W)
    others = F.cross_entropy(z[1:].flatten(0, 1), y[1:].flatten())
    return F.cross_entropy(z[0], y[0]) + 0.5 * others


def chosen_and_rejected(h, W, y):
    z = F.linear(h, W)
    chosen, rejected = picked(z[: B // 2], y[: B // 2]), picked(z[B // 2 :], y[B // 2 :])
    return -F.logsigmoid(0.1 * (chosen.sum(-1) - rejected.sum(-1))).mean() - chosen.mean()


def halves_of_positions(h, W, y):
    early, late = F.linear(h, W).chunk(2, 1)
    y_early, y_late = y.chunk(2, 1)
    late = F.cross_entropy(late.flatten(0, 1), y_late.flatten())
    return F.cross_entropy(early.flatten(0, 1), y_early.flatten()) + 0.5 * late


def codebooks(h, W, y):
    z, codes = F.linear(h, W).view(B, S // 2, 2, V), y.view(B, S // 2, 2)
    return sum(F.cross_entropy(z[:, :, k].reshape(-1, V), codes[..., k].reshape(-1)) for k in range(2))


def shifted_by_as_many(h, W, y):
    """Of ranges that leave rows out, each others."""
    z, loss = F.linear(h, W), 0
    for i in range(B):
        loss = loss + F.cross_entropy(z[i, : S - i], y[i, i:])
    return loss


def log_probabilities_of_each(h, W, y):
    rows = [picked(z[1:-1], t[2:]) for z, t in zip(F.linear(h, W).float(), y, strict=True)]
    return -torch.cat(rows).exp().mean()


def masks_of_each(h, W, y):
    z, loss = F.linear(h, W), 0
    for i in range(B):
        counted = y[i] != -100
        loss = loss - (picked(z[i], y[i]) * counted).sum() / counted.sum()
    return loss


def three_or_none_of_a_split(h, W, y):
    parts, labels = F.linear(h, W).split([1, 1, 2]), y.split([1, 1, 2])
    return sum(F.cross_entropy(z.view(-1, V), t.view(-1)) for z, t in zip(parts, labels, strict=True))


def early_exits(h, W, y):
    """Of one layer over stacked hidden states, of each shifted by one."""
    z, loss = F.linear(torch.stack([h, h * 0.5, h.tanh()]), W), 0
    for i in range(3):
        loss = loss + (i + 1) * F.cross_entropy(z[i][:, :-1].reshape(-1, V), y[:, 1:].reshape(-1))
    return loss


def halves_of_the_batch(h, W, y):
    """As preference losses have them, shifted by one."""
    z, t = F.linear(h, W).chunk(2), y.chunk(2)
    chosen, rejected = (picked(a[:, :-1], b[:, 1:]) for a, b in zip(z, t, strict=True))
    return -chosen.mean() - F.logsigmoid(0.1 * (chosen.sum(-1) - rejected.sum(-1))).mean()


JOINED = {
    early_exits: 3,
    sequence_by_sequence: B,
    in_a_loop_with_weights: B,
    position_by_position: S,
    class_weights: B,
    first_and_others: 2,
    chosen_and_rejected: 1,  # read as one loss
    halves_of_positions: 2,
    codebooks: 2,
    shifted_by_as_many: B,
    masks_of_each: B,
    three_or_none_of_a_split: 3,
    halves_of_the_batch: 2,
}


def check(f: Loss, compiled: Loss, args: Inputs) -> None:
    check_numbers(run(compiled, args), f, args)


@pytest.mark.parametrize(
    ("f", "strategy"), in_turns([*JOINED], ["token_chunks", "vocab_slabs", "materialise"])
)
def test_one_head(f: Loss, strategy: str):
    compiled, graphs = compile_without_codegen(f, strategy=strategy, memory_budget=0.5)
    check(f, compiled, inputs())
    assert (sites(), misses()) == (JOINED[f], 0)
    assert (graphs.pieces > 1) == (strategy != "materialise")


@pytest.mark.parametrize("f", JOINED, ids=lambda f: f.__name__)
def test_one_operator(f: Loss):
    backend = Rewritten()
    check(f, torch.compile(f, backend=backend), inputs())
    assert backend.count(ops.ROW_STATS) == 1


def test_every_site_is_told_the_plan():
    with inductor_ce.install(strategy="token_chunks"):
        told = inductor_ce.explain(sequence_by_sequence, *inputs()).sites
    assert [site.strategy for site in told] == ["token_chunks"] * B


def test_sizes_that_change():
    compiled, _ = compile_without_codegen(sequence_by_sequence, dynamic=True)
    for s in (S, S + 3):
        check(sequence_by_sequence, compiled, inputs(s))


def of_some_length(h: Tensor, y: Tensor) -> None:
    for each in (h, y):
        torch._dynamo.mark_dynamic(each, 1)


JOINED_AT_ANY_LENGTH = [
    *(early_exits, sequence_by_sequence, in_a_loop_with_weights, class_weights, first_and_others),
    *(chosen_and_rejected, masks_of_each, three_or_none_of_a_split, halves_of_the_batch),
]


@pytest.mark.parametrize("f", JOINED_AT_ANY_LENGTH, ids=lambda f: f.__name__)
def test_one_operator_at_any_length(f: Loss, monkeypatch: pytest.MonkeyPatch):
    """Parts of the batch are joined, of sequences of symbolic length, longer than was tried too."""
    monkeypatch.setattr(joined_rows, "_AS_MANY", (11, 13))
    backend = Rewritten()
    compiled = torch.compile(f, backend=backend)
    for s in (S, 3, 20):
        given = inputs(s)
        of_some_length(given[0], given[2])
        check(f, compiled, given)
    assert len(backend.final) == backend.count(ops.ROW_STATS) == 1


@pytest.mark.parametrize("strategy", ["token_chunks", "vocab_slabs"])
@pytest.mark.parametrize("f", [sequence_by_sequence, halves_of_the_batch], ids=lambda f: f.__name__)
def test_one_head_at_any_length(f: Loss, strategy: str):
    compiled, graphs = compile_without_codegen(f, strategy=strategy, memory_budget=0.5)
    for s in (S, S + 3):
        given = inputs(s)
        of_some_length(given[0], given[2])
        check(f, compiled, given)
    assert graphs.pieces > 1


# What stays apart, and is as it was


def overlapping(h, W, y):
    z = F.linear(h, W)
    return F.cross_entropy(z[:3].flatten(0, 1), y[:3].flatten()) + F.cross_entropy(z[2], y[2])


def other_reductions(h, W, y):
    z = F.linear(h, W)
    return F.cross_entropy(z[0], y[0]) + z[1].logsumexp(-1).square().mean() + picked(z[2:], y[2:]).sum()


def edited_between(h, W, y):
    z = F.linear(h, W)
    loss = F.cross_entropy(z[0], y[0])
    z[1] *= 2
    return loss + F.cross_entropy(z[1], y[1]) + F.cross_entropy(z[2], y[2])


def labels_of_the_other_part(h, W, y):
    z = F.linear(h, W)
    first = F.cross_entropy(z[0], y[0], reduction="none")
    return first.mean() + F.cross_entropy(z[1], (first.detach() * 7).long() % V)


def labels_edited_between(h, W, y):
    z, y = F.linear(h, W), y.clone()
    loss = F.cross_entropy(z[0], y[0].clone())
    y[1] = (y[1] + 1) % V
    return loss + sum(F.cross_entropy(z[i], y[i]) for i in range(1, B))


def labels_edited_by_another_name(h, W, y):
    z, y = F.linear(h, W), y.clone()
    labels = [y[i] for i in range(B)]
    loss = F.cross_entropy(z[0], labels[0].clone())
    y.clamp_(min=0).sub_(V - 1).neg_()
    return loss + sum(F.cross_entropy(z[i], labels[i]) for i in range(1, B))


def temperatures_of_their_own(h, W, y):
    z = F.linear(h, W)
    return sum(F.cross_entropy(z[i] / (i + 1), y[i]) for i in range(B))


def one_without_a_gradient(h, W, y):
    z = F.linear(h, W)
    with torch.no_grad():
        scale = F.cross_entropy(z[0], y[0])
    return sum(F.cross_entropy(z[i], y[i]) for i in range(1, B)) * scale


def one_seen_without_a_gradient(h, W, y):
    """The loss has none of the first rows, though it is made where gradients are on."""
    z = F.linear(h, W)
    with torch.no_grad():
        first = z[0]
    return F.cross_entropy(first, y[0]) + sum(F.cross_entropy(z[i], y[i]) for i in range(1, B)).square()


def labels_of_parts_that_were_joined(h, W, y):
    """By statistics of the classes, which are joined before the losses are."""
    z = F.linear(h, W)
    first, second = z[1], z[2]
    loss = F.cross_entropy(first, first.argmax(-1))
    return loss - second.log_softmax(-1).gather(-1, second.argmax(-1).unsqueeze(-1)).squeeze(-1).mean()


def labels_of_what_was_replaced(h, W, y):
    """Of all rows, made again where the statistics of parts of them are made."""
    z = F.linear(h, W)
    first, others, last = z[:, :3], z[:, 3:], z[2:]
    losses = [F.cross_entropy(first.reshape(-1, V), first.argmax(-1).reshape(-1))]
    losses.append(F.cross_entropy(others.reshape(-1, V), others.argmax(-1).reshape(-1)))
    losses.append(F.cross_entropy(last.reshape(-1, V), last.argmax(-1).reshape(-1)))
    return losses[0] + 2 * losses[1] + 3 * losses[2]


def classes_that_are_cut_off(h, W, y):
    z, n = F.linear(h, W), V - 100
    return sum(F.cross_entropy(z[i, :, :n], y[i].clamp(-100, n - 1)) for i in range(B))


def a_half_of_the_classes(h, W, y):
    z, n = F.linear(h, W), V // 2
    return sum(F.cross_entropy(z[i].chunk(2, -1)[i % 2], y[i].clamp(-100, n - 1)) for i in range(B))


def a_range_of_the_classes(h, W, y):
    z, n = F.linear(h, W), V - 100
    parts = [z[:, i].narrow(1, 100, n) for i in range(S)]
    return sum(F.cross_entropy(part, y[:, i].clamp(-100, n - 1)) for i, part in enumerate(parts))


def rows_that_the_user_fills_up(h, W, y):
    """Labels of 0 that count, where another loss has labels of its own."""
    z = F.linear(h, W)
    filled = F.pad(y[2:].clamp(min=0), (0, 0, 2, 0), value=0)
    return F.cross_entropy(z.view(-1, V), filled.view(-1)) + F.cross_entropy(z[0], y[1])


def one_half_twice(h, W, y):
    """Whose labels are clamped in one loss, and not in the other."""
    z, t = F.linear(h, W).chunk(2), y.chunk(2)
    chosen, rejected = (picked(a[:, :-1], b[:, 1:]).sum(-1) for a, b in zip(z, t, strict=True))
    nll = F.cross_entropy(z[0][:, :-1].reshape(-1, V), t[0][:, 1:].reshape(-1))
    return nll - F.logsigmoid(0.1 * (chosen - rejected)).mean()


def from_some_place_on(h, W, y):
    """Of which fewer rows than the user says are cut off where the sequence is short."""
    z = F.linear(h, W)
    early = sum(F.cross_entropy(z[i, :-1], y[i, 1:]) for i in range(B))
    return early + sum(F.cross_entropy(z[i, -5:], y[i, -5:], reduction="sum") for i in range(B))


def backwards(h, W, y):
    z = F.linear(h, W).flip(0)
    return sum(F.cross_entropy(z[i], y[i]) for i in range(B))


APART = [
    *(overlapping, other_reductions, edited_between, labels_of_the_other_part, labels_edited_between),
    labels_edited_by_another_name,
    *(one_seen_without_a_gradient, labels_of_parts_that_were_joined, labels_of_what_was_replaced),
    *(classes_that_are_cut_off, a_half_of_the_classes, a_range_of_the_classes),
    *(temperatures_of_their_own, one_without_a_gradient, rows_that_the_user_fills_up, backwards),
    *(log_probabilities_of_each, from_some_place_on, one_half_twice),
]


@pytest.mark.parametrize(("f", "strategy"), in_turns(APART, ["token_chunks", "materialise"]))
def test_numbers(f: Loss, strategy: str, caplog: pytest.LogCaptureFixture):
    compiled, _ = compile_without_codegen(f, strategy=strategy, memory_budget=0.5)
    check(f, compiled, inputs())
    assert sites() > 0
    assert not caplog.records, "something failed"


@pytest.mark.parametrize("f", [*APART, position_by_position, halves_of_positions], ids=lambda f: f.__name__)
def test_numbers_at_any_length(f: Loss, caplog: pytest.LogCaptureFixture):
    backend = Rewritten()
    compiled = torch.compile(f, backend=backend)
    for s in (S, S + 3):
        given = inputs(s)
        of_some_length(given[0], given[2])
        check(f, compiled, given)
    assert not caplog.records, "something failed"


def test_few_rows_of_many_are_no_matter():
    def f(h, W, y):
        z = F.linear(h, W)
        return F.cross_entropy(z[0, :1], y[0, 2:3]) + F.cross_entropy(z[1, :1], y[1, 2:3])

    backend = Rewritten()
    check(f, torch.compile(f, backend=backend), inputs())
    assert backend.count(ops.ROW_STATS) == 2


def test_verified():
    compiled, _ = compile_without_codegen(sequence_by_sequence, verify=True)
    check(sequence_by_sequence, compiled, inputs())
    assert sites() == B
