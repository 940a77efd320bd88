"""Divergences whose logits come from heads: those of all sides are made for the rows of a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from gpu_codegen import lower_after_passes
from harness import Graphs, compile_lazily, compile_without_codegen
from head_cases import counts
from kernels import backwards_at_once
from pairwise import EVERYTHING, in_turns
from reference import assert_all_fair, assert_fair, log_sum_exp
from test_head_memory import largest, most_at_once, saved, sizes
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from two_heads import D, E, Given, Loss, N, V, frozen, given

import inductor_ce
from inductor_ce import ops
from inductor_ce.heads import fuse, narrow_sums
from inductor_ce.heads.extra_memory import HeadNumbers
from inductor_ce.ops import label_products, lowering

BUDGET = 1.6  # of the float32 logits of one side: for two or three pieces of most


LEAVES = Given._fields[:5]


def other_pass(h: Tensor) -> Tensor:
    """Hidden states of a second pass, with dropout of its own."""
    return h * (torch.arange(h.shape[-1], device=h.device) % 3 - 0.5).to(h.dtype)


def labels(mask: Tensor) -> Tensor:
    return torch.where(mask, torch.arange(len(mask), device=mask.device) % V, -100)


# As they are written


def by_mixture(s: Tensor, q: Tensor, beta: float) -> Tensor:
    """As in generalised knowledge distillation, for each row and class."""
    log_p, log_q = s.log_softmax(-1), q.log_softmax(-1)
    weight = torch.tensor(beta, dtype=log_p.dtype)
    log_m = torch.logsumexp(torch.stack([log_p + torch.log1p(-weight), log_q + torch.log(weight)]), 0)
    to_teacher = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    to_student = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    return weight * to_teacher + (1 - weight) * to_student


def generalised(beta: float) -> Loss:
    def loss(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        each = by_mixture(F.linear(h, W) / 0.9, frozen(t, U, b) / 0.9, beta)
        return (each * mask[:, None]).sum() / mask.sum()

    return loss


def jensen_shannon(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Two students, each of which has its head."""
    log_p, log_q = F.linear(h, W).log_softmax(-1), F.linear(t, U).log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    rows = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)
    return torch.where(mask, rows, 0).sum() / mask.sum()


def capped(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Sequences, in float32 at least, behind a soft-cap and beside a bias that learns."""
    s = 3 * torch.tanh(F.linear(h.view(3, -1, D), W).to(both(h)) / 3)
    q = F.linear(t.view(3, -1, E), U, b).to(both(h))
    return by_mixture(s, q, 0.3).sum(-1).mean()


def both(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def teacher_learns(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    log_p, q = F.linear(h, W).log_softmax(-1), F.linear(t, U).softmax(-1)
    return F.kl_div(log_p, q, reduction="none").sum(-1).square().mean()


def r_drop(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Two passes, one weight, and labels."""
    s, q = F.linear(h, W), F.linear(other_pass(h), W)
    log_p, log_q = s.log_softmax(-1), q.log_softmax(-1)
    one = F.kl_div(log_p, q.softmax(-1), reduction="batchmean")
    two = F.kl_div(log_q, s.softmax(-1), reduction="batchmean")
    y = labels(mask)
    return 0.5 * (F.cross_entropy(s, y) + F.cross_entropy(q, y)) + 0.7 * (one + two)


def consistency(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Three views, of which the last is held, and one weight."""
    views = F.linear(h, W), F.linear(other_pass(h), W), F.linear(h.flip(1), W).detach()
    p = [z.softmax(-1) for z in views]
    log_m = (sum(p) / 3).log()
    return sum(F.kl_div(log_m, each, reduction="batchmean") for each in p)


def learnt_temperature(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    log_p = (F.linear(h, W) * b.mean().exp()).log_softmax(-1)
    log_q = (F.linear(t, U) * 0.5).log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()


def answers_alone(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Of both sides the positions that predict an answer; the others are not even multiplied."""
    s = F.linear(h.view(3, -1, D), W)[:, 2:-1, :]
    q = frozen(t.view(3, -1, E), U, b)[:, 2:-1, :]
    kept = mask.view(3, -1)[:, 3:]
    return (by_mixture(s / 0.9, q / 0.9, 0.5) * kept[..., None]).sum() / kept.sum()


# Their formulas, over the rows of two sets of logits


def log_p(z: Tensor) -> Tensor:
    return z - log_sum_exp(z)[..., None]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Of probabilities, for each row."""
    return (p * (p.log() - q.log())).sum(-1)


def jsd(z: Tensor, t: Tensor, beta: float = 0.5) -> Tensor:
    p, q = log_p(z).exp(), log_p(t).exp()
    m = (1 - beta) * p + beta * q
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def product(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("nd,vd->nv", x, w)


def exact_generalised(beta: float) -> Loss:
    def exact(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        q = (product(t, U) + b).detach()
        return (jsd(product(h, W) / 0.9, q / 0.9, beta) * mask).sum() / mask.sum()

    return exact


def exact_jensen_shannon(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return (jsd(product(h, W), product(t, U)) * mask).sum() / mask.sum()


def exact_capped(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return jsd(3 * torch.tanh(product(h, W) / 3), product(t, U) + b, 0.3).mean()


def exact_teacher_learns(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return kl(log_p(product(t, U)).exp(), log_p(product(h, W)).exp()).square().mean()


def exact_r_drop(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    s, q = log_p(product(h, W)), log_p(product(other_pass(h), W))
    picked = (s + q)[torch.arange(len(mask)), labels(mask).clamp(min=0)]
    hard = -0.5 * (picked * mask).sum() / mask.sum()
    return hard + 0.7 * ((s.exp() - q.exp()) * (s - q)).sum(-1).mean()


def exact_consistency(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    views = product(h, W), product(other_pass(h), W), product(h.flip(1), W).detach()
    p = [log_p(z).exp() for z in views]
    return sum(kl(each, (p[0] + p[1] + p[2]) / 3) for each in p).mean()


def exact_temperature(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    p, q = log_p(product(h, W) * b.mean().exp()).exp(), log_p(product(t, U) * 0.5).exp()
    return (kl(p, q) + kl(q, p)).mean()


def exact_answers(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    rows = jsd(product(h, W) / 0.9, (product(t, U) + b).detach() / 0.9).view(3, -1)[:, 2:-1]
    kept = mask.view(3, -1)[:, 3:]
    return (rows * kept).sum() / kept.sum()


class Case(NamedTuple):
    """A loss as it is written, its formula, the leaves that learn, and how many sides it has."""

    loss: Loss
    exact: Loss
    moving: str = "h W"
    sides: int = 2


CASES: dict[str, Case] = {
    "beta 0.1": Case(generalised(0.1), exact_generalised(0.1)),
    "beta 0.5": Case(generalised(0.5), exact_generalised(0.5)),
    "beta 0.9": Case(generalised(0.9), exact_generalised(0.9)),
    "frozen weight": Case(generalised(0.5), exact_generalised(0.5), "h"),
    "weight alone": Case(generalised(0.5), exact_generalised(0.5), "W"),
    "answers alone": Case(answers_alone, exact_answers),
    "both": Case(jensen_shannon, exact_jensen_shannon, "h W t U"),
    "capped": Case(capped, exact_capped, "h W t U b"),
    "teacher learns": Case(teacher_learns, exact_teacher_learns, "h W t U"),
    "other side alone": Case(jensen_shannon, exact_jensen_shannon, "t U"),
    "one weight": Case(r_drop, exact_r_drop),
    "three views": Case(consistency, exact_consistency, sides=3),
    "temperature": Case(learnt_temperature, exact_temperature, "h W t U b"),
}


Made = tuple[Tensor, dict[str, Tensor]]


def measured(f: Loss, inputs: Given, moving: str, upstream: float = 1.0) -> Made:
    """The loss, and the gradients of the leaves that learn."""
    leaves = {
        name: getattr(inputs, name).detach().clone().requires_grad_(name in moving.split()) for name in LEAVES
    }
    value = f(**leaves, mask=inputs.mask)
    value.backward(torch.full_like(value, upstream))
    made = {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    assert None not in made.values()
    return value.detach(), made


def check(f: Loss, name: str, inputs: Given, upstream: float = -2.5) -> None:
    case = CASES[name]
    value, gradients = measured(f, inputs, case.moving, upstream)
    naive, of_naive = measured(case.loss, inputs, case.moving, upstream)
    if value.dtype == torch.float64:  # in which no formula is more exact than eager
        torch.testing.assert_close((value, gradients), (naive, of_naive), rtol=1e-12, atol=1e-14)
        return
    exact, of_exact = measured(case.exact, inputs.to(torch.float64), case.moving, upstream)
    assert_fair(value, naive, exact)
    assert_all_fair(gradients, of_naive, of_exact)


def in_chunks(loss: Loss, **options: object) -> tuple[Loss, Graphs]:
    return compile_without_codegen(loss, **{"strategy": "token_chunks", "memory_budget": BUDGET, **options})


@pytest.mark.parametrize(
    ("name", "dtype"), in_turns([*CASES], [torch.float64, torch.float32, torch.bfloat16])
)
def test_right_and_nowhere_whole(name: str, dtype: torch.dtype) -> None:
    """Nothing in the graphs is larger than the logits of a piece, of whichever side."""
    compiled, graphs = in_chunks(CASES[name].loss)
    check(compiled, name, given().to(dtype))
    forward, backward = graphs.final
    sides = CASES[name].sides
    assert counts() == {"token_chunks": sides}
    assert (pieces := graphs.count(ops.DIVERGENCE)) >= 2
    assert graphs.count(torch.ops.inductor_ce.logits.default) == graphs.pieces == sides * pieces
    assert largest(forward) <= -(-N // pieces) * V
    assert max(saved(forward)) <= max(V * E, N * E, 3 * N)
    assert largest(backward) <= max(V * E, N * E)


@pytest.mark.parametrize("name", ["beta 0.3", "both", "capped", "three views"])
def test_without_gradients(name: str) -> None:
    case = CASES[name] if name in CASES else Case(generalised(0.3), exact_generalised(0.3))
    compiled, graphs = in_chunks(case.loss)
    inputs = given()
    with torch.no_grad():
        ours = compiled(*inputs)
        assert_fair(ours, case.loss(*inputs), case.exact(*inputs.to(torch.float64)))
    assert counts() == {"forward_only": case.sides}
    (forward,) = graphs.final
    assert (pieces := graphs.count(ops.DIVERGENCE)) >= 2
    assert largest(forward) <= -(-N // pieces) * V


@pytest.mark.parametrize("n", [57, 61])
def test_rows_that_are_no_multiple(n: int) -> None:
    for name in ("beta 0.1", "one weight"):
        torch._dynamo.reset()
        compiled, graphs = in_chunks(CASES[name].loss)
        check(compiled, name, given(n).to(torch.float64))
        assert graphs.count(ops.DIVERGENCE) >= 2


@pytest.mark.parametrize("cut", [lambda z: z[:, :-1], lambda z: z.view(-1, V)[: N // 2]])
def test_rows_are_cut_off_logits_as_they_are(cut: Callable[[Tensor], Tensor]) -> None:
    """With no step behind the layer, statistics could be of all rows, and keep the logits of all."""

    def loss(h: Tensor, W: Tensor, t: Tensor, U: Tensor) -> Tensor:
        return by_mixture(cut(F.linear(h, W)), cut(frozen(t, U)), 0.5).sum(-1).mean()

    compiled, graphs = in_chunks(loss)
    W, U = torch.randn(V, D).double().requires_grad_(), torch.randn(V, E).double()
    h, t = torch.randn(4, N // 4, D).double().requires_grad_(), torch.randn(4, N // 4, E).double()
    ours = torch.autograd.grad(compiled(h, W, t, U), (h, W))
    torch.testing.assert_close(ours, torch.autograd.grad(jsd(cut(h @ W.t()), cut(t @ U.t())).mean(), (h, W)))
    assert counts() == {"token_chunks": 2}
    assert graphs.count(torch.ops.inductor_ce.logits.default) == 2 * graphs.count(ops.DIVERGENCE)


def test_answers_behind_prompts_of_any_length() -> None:
    """What is cut off is known behind the layers alone, one of which has no gradient."""

    def loss(h: Tensor, W: Tensor, t: Tensor, U: Tensor, prompts: Tensor) -> Tensor:
        s, q = F.linear(h, W), frozen(t, U)
        first = prompts.shape[1]
        return by_mixture(s[:, first - 1 : -1, :], q[:, first - 1 : -1, :], 0.5).sum(-1).mean()

    compiled, graphs = in_chunks(loss, dynamic=True)
    W, U = torch.randn(V, D).double(), torch.randn(V, E).double()
    for length, first in ((20, 7), (24, 8)):
        h, t = torch.randn(3, length, D).double(), torch.randn(3, length, E).double()
        h, W = h.requires_grad_(), W.requires_grad_()
        ours = torch.autograd.grad(compiled(h, W, t, U, torch.zeros(3, first)), (h, W))
        rows = jsd(h[:, first - 1 : -1] @ W.t(), t[:, first - 1 : -1] @ U.t()).mean()
        torch.testing.assert_close(ours, torch.autograd.grad(rows, (h, W)))
    assert len(graphs.final) == 2
    assert counts() == {"token_chunks": 2}
    assert graphs.count(torch.ops.inductor_ce.logits.default) == 2 * graphs.count(ops.DIVERGENCE)


@pytest.mark.parametrize("name", ["teacher learns", "both"])
def test_symbolic_rows(name: str) -> None:
    compiled, graphs = in_chunks(CASES[name].loss, dynamic=True)
    for n in (60, 35):
        check(compiled, name, given(n).to(torch.float64))
    assert len(graphs.final) == 2
    assert counts() == {"token_chunks": 2}
    assert graphs.count(ops.DIVERGENCE) >= 2


def test_generated_code() -> None:
    """It is right, and has of a piece the logits of both sides and their gradients at most."""
    inductor_ce.install(min_vocab=2, strategy="token_chunks", memory_budget=2.2)
    with backwards_at_once():
        _, codes = run_and_get_code(lambda: check(torch.compile(r_drop), "one weight", given()))
    assert counts() == {"token_chunks": 2}
    piece = N // 2 * V
    assert max(size for code in codes for size in sizes(code).values()) <= piece
    assert max(most_at_once(code, piece) for code in codes) <= 2
    assert sum(code.count("extern_kernels.inductor_ce_logits(") for code in codes) == 4


@pytest.mark.parametrize("name", ["other side alone", "both", *["beta 0.5", "one weight"] * EVERYTHING])
def test_code_for_a_gpu(name: str) -> None:
    """Of the size of a piece there are the logits, and in bfloat16 a gradient for each side that moves.

    That of one side alone, behind no chain, is written over its logits.
    """
    compiled, graphs = in_chunks(CASES[name].loss, memory_budget=2.2)
    measured(compiled, given().to(torch.bfloat16), CASES[name].moving)
    lowering.register()
    wrapper = lower_after_passes(graphs.final[0], is_backward=False)
    piece = -(-N // (pieces := graphs.count(ops.DIVERGENCE))) * V
    gradients = {"beta 0.5": 1, "other side alone": 0}.get(name, 2)
    assert most_at_once(wrapper.code, piece) == gradients
    assert [shape for shape in wrapper.allocations_of("float32") if math.prod(shape) >= piece] == []
    assert wrapper.code.count("extern_kernels.inductor_ce_logits(") == 2 * pieces


@pytest.mark.usefixtures("much")
def test_one_weight_is_summed_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entries at the labels of both passes, and the rows of frequent labels, are added at last."""
    monkeypatch.setattr(narrow_sums, "OFTEN", 8)
    inputs = given().to(torch.bfloat16)
    inputs = inputs._replace(mask=torch.ones(N, dtype=torch.bool))
    compiled, graphs = in_chunks(r_drop, memory_budget=2.2)
    check(compiled, "one weight", inputs, upstream=0.7)
    nodes = [n for n in graphs.nodes if n.op == "call_function" and "empty" in str(n.target)]
    sums = [n.meta["val"] for n in nodes if n.meta["val"].shape == (V, D)]
    assert [x.dtype for x in sums] == [torch.bfloat16], "one sum of both sides"
    assert sum(label_products.COMPLETE in node.args for node in graphs.nodes) == 1


def test_one_sum_of_one_weight() -> None:
    """Both passes add to one gradient of the weight, in float32 beside bfloat16."""
    compiled, graphs = in_chunks(r_drop)
    measured(compiled, given().to(torch.bfloat16), "h W")
    nodes = [n for n in graphs.nodes if n.op == "call_function" and "empty" in str(n.target)]
    assert [x.dtype for x in (n.meta["val"] for n in nodes) if x.shape == (V, D)] == [torch.float32]


@pytest.mark.parametrize(
    ("name", "chained", "added", "d_weights", "d_hidden", "shares"),
    [
        ("beta 0.5", True, 2, D, D, 1),
        ("frozen weight", True, 2, 0, D, 1),
        ("other side alone", False, 2, E, E, 1),
        ("both", True, 4, D + E, D + E, 1),
        ("one weight", True, 4, D, 2 * D, 2),
    ],
)
def test_what_the_plan_counts(
    name: str, chained: bool, added: int, d_weights: int, d_hidden: int, shares: int
) -> None:
    """Of the first side 2 bytes a logit, and of its gradient; what the other adds, and all gradients."""
    numbers_of, found = fuse.numbers_of, list[HeadNumbers]()

    def noted(*given: Any) -> HeadNumbers:
        found.append(numbers_of(*given))
        return found[-1]

    compiled, _ = in_chunks(CASES[name].loss)
    with mock.patch.object(fuse, "numbers_of", noted):
        measured(compiled, given().to(torch.bfloat16), CASES[name].moving)
    counted = found[-1]
    assert (counted.element, counted.chained, counted.added) == (2, chained, added)
    assert (counted.d_weights, counted.d_hidden, counted.shares) == (d_weights, d_hidden, shares)


def test_a_loop_over_chunks() -> None:
    """As users write it: each chunk has its own teacher's logits, and all are done one after another."""

    def loop(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        parts = zip(h.chunk(3), t.chunk(3), strict=True)
        return sum(by_mixture(F.linear(x, W), frozen(y, U), 0.5).sum() for x, y in parts) / N

    def exact(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        return jsd(product(h, W), product(t, U).detach()).mean()

    compiled, graphs = compile_without_codegen(loop)
    inputs = given().to(torch.float64)
    ours, right = (measured(f, inputs, "h W") for f in (compiled, exact))
    torch.testing.assert_close(ours, right)
    assert counts() == {"token_chunks": 6}
    assert largest(graphs.final[0]) == N // 3 * V


def test_it_is_told() -> None:
    h, W, *others = given()
    with inductor_ce.install(min_vocab=2, strategy="token_chunks", memory_budget=BUDGET):
        (site,) = inductor_ce.explain(r_drop, h.requires_grad_(), W.requires_grad_(), *others).sites[:1]
    assert "the logits of all sides are those of the same rows" in site.plan
    assert site.rows == "a divergence is made of all rows"
    assert not site.head


def test_returned_logits_are_lazy() -> None:
    def model(h: Tensor, W: Tensor, t: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
        s = F.linear(h, W)
        return by_mixture(s, frozen(t, U), 0.5).sum(), s

    h, W, t, U, *_ = given()
    h, W = h.requires_grad_(), W.requires_grad_()
    compiled, graphs = compile_lazily(model, strategy="token_chunks", memory_budget=BUDGET)
    value, s = compiled(h, W, t, U)
    value.backward()
    assert counts() == {"token_chunks": 2}
    assert max(map(largest, graphs.final)) < N * V
    torch.testing.assert_close(s, F.linear(h, W))


# A side, or all, whole


def part(s: Tensor, q: Tensor) -> Tensor:
    return by_mixture(s, q, 0.5).sum(-1)


def returned(h: Tensor, W: Tensor, t: Tensor, U: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    q = frozen(t, U)
    return part(F.linear(h, W), q).mean(), q.cumsum(0)


def rolled(h: Tensor, W: Tensor, t: Tensor, U: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Rows of the other side are moved: those of a piece are not made of the same rows."""
    return (part(F.linear(h, W), frozen(t, U).roll(1, 0)).mean(),)


def logits_that_are_given(h: Tensor, W: Tensor, t: Tensor, U: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    return (part(F.linear(h, W), U.t().repeat(N // E, 1)).mean(),)


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (returned, "the logits, or their gradient, are read by cumsum as well"),
        (rolled, "no linear layer makes them row by row"),
        (logits_that_are_given, "no linear layer makes them row by row"),
    ],
)
def test_another_side_is_whole(loss: Callable[..., tuple[Tensor, ...]], why: str) -> None:
    """Those of the side that moves are in pieces, and `explain` says why the others are not."""
    h, W, t, U, _, mask = given().to(torch.float64)
    compiled, _ = in_chunks(lambda *given: loss(*given)[0])
    made = []
    for f in (compiled, lambda *given: loss(*given)[0]):
        leaves = [x.clone().requires_grad_() for x in (h, W)]
        value = f(*leaves, t, U, mask)
        made.append([value, *torch.autograd.grad(value, leaves)])
    torch.testing.assert_close(*made)
    torch._dynamo.reset()
    site = inductor_ce.explain(loss, h.requires_grad_(), W.requires_grad_(), t, U, mask).sites[0]
    assert site.strategy == "token_chunks"
    assert f"the logits of another side of a divergence are whole: {why}" in site.plan


def for_each_row(h: Tensor, W: Tensor, t: Tensor, U: Tensor) -> Tensor:
    """Upstream gradients of its own each."""
    return part(F.linear(h, W), F.linear(t, U))


def of_all_rows(h: Tensor, W: Tensor, t: Tensor, U: Tensor) -> Tensor:
    """The gradient of each row depends on the others."""
    rows = part(F.linear(h, W), F.linear(t, U))
    return (rows.softmax(0) * rows).sum()


def one_is_given(h: Tensor, W: Tensor, t: Tensor, U: Tensor) -> Tensor:
    """A gradient is wanted of logits that no linear layer makes."""
    return part(F.linear(h, W), U.t().repeat(N // E, 1)).mean()


def other_rows(h: Tensor, W: Tensor, t: Tensor, U: Tensor) -> Tensor:
    return part(F.linear(h, W), F.linear(t, U).flip(0)).mean()


@pytest.mark.parametrize(
    ("loss", "dtype", "why"),
    [
        (for_each_row, torch.float64, "a divergence is not summed up from blocks of classes"),
        (of_all_rows, torch.float64, "a divergence is not summed up from blocks of classes"),
        (lambda *given: for_each_row(*given).mean(), torch.float16, "float16 gradients"),
        (one_is_given, torch.float64, "no linear layer makes them row by row"),
        (other_rows, torch.float64, "no linear layer makes them row by row"),
    ],
)
def test_all_are_whole(loss: Loss, dtype: torch.dtype, why: str) -> None:
    inputs = given().to(dtype)[:4]
    compiled, _ = in_chunks(loss)
    made = []
    for f in (compiled, loss):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = f(*leaves)
        upstream = torch.arange(value.numel()).cos().to(dtype).view(value.shape)
        gradients = torch.autograd.grad(value, leaves, upstream, materialize_grads=True)
        made.append([value, *gradients])
    tolerance = {} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(*made, **tolerance)
    assert set(counts()) == {"materialise"}
    torch._dynamo.reset()
    site = inductor_ce.explain(loss, *(x.clone().requires_grad_() for x in inputs)).sites[0]
    assert site.strategy == "materialise"
    assert why in site.plan
