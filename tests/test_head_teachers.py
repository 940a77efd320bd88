"""Distillation from two heads: the teacher's logits are made for the rows of a piece, with the student's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gpu_codegen import lower_after_passes
from harness import Graphs, compile_with_codegen, compile_without_codegen
from head_cases import counts
from pairwise import EVERYTHING, in_turns
from reference import assert_fair, log_sum_exp
from test_head_memory import largest, most_at_once, saved
from torch import Tensor
from two_heads import D, E, Given, Loss, N, V, frozen, given

import inductor_ce
from inductor_ce.ops import lowering

PIECES = 4
BUDGET = 1.0  # of the float32 logits of the student: a piece has its own, the weights, and a chain


# As they are written, and their formulas over the rows of two sets of logits.


def forward_kl(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    s, q = F.linear(h, W) / 2, frozen(t, U) / 2
    return F.kl_div(F.log_softmax(s, -1), F.softmax(q, -1), reduction="batchmean") * 4


def masked_forward_kl(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    s, q = h @ W.t(), frozen(t, U, b)
    rows = F.kl_div(s.log_softmax(-1), q.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return (rows * mask).sum() / mask.sum()


def soft_cross_entropy(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    q = F.softmax(frozen(t, U).float().to(torch.promote_types(h.dtype, torch.float32)), -1)
    return F.cross_entropy(F.linear(h, W), q.to(h.dtype))


def reverse_kl(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    s, q = F.linear(h, W).log_softmax(-1), frozen(t, U, b).log_softmax(-1)
    rows = (s.exp() * (s - q)).sum(-1)
    return torch.where(mask, rows, 0).sum() / mask.sum()


def by_hand(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Sequences, a soft-cap, and a logsumexp that nobody asked for."""
    s = torch.matmul(h.view(3, -1, D), W.t())
    q = torch.matmul(t.view(3, -1, E), U.t()).detach()
    q = 3 * torch.tanh(q / 3)
    log_q = q - torch.logsumexp(q, -1, keepdim=True)
    return -(log_q.exp() * s.log_softmax(-1)).sum(-1).mean()


def sure_rows(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Each row counts as much as the teacher is sure of it."""
    s, q = F.linear(h, W), F.softmax(frozen(t, U), -1)
    rows = -(q * s.log_softmax(-1)).sum(-1)
    return (rows * q.amax(-1)).mean()


def with_entropies(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Rows count by the teacher's confidence, and its entropy is told: statistics of its logits as well."""
    s, q = F.linear(h, W), F.linear(t, U)
    log_q = q.log_softmax(-1)
    sure = log_q.exp().amax(-1)
    return (sure * _kl_of(s, q)).mean() - 0.1 * (log_q.exp() * log_q).sum(-1).mean()


def squared(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """The gradient of a row depends on what is summed of the teacher, and of both."""
    s, q = F.linear(h, W), frozen(t, U)
    rows = F.kl_div(s.log_softmax(-1), q.softmax(-1), reduction="none").sum(-1)
    return rows.square().mean()


def beside_labels(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    s, q = F.linear(h, W), frozen(t, U)
    y = torch.where(mask, torch.arange(len(mask)) % V, -100)
    return F.cross_entropy(s, y) + _kl_of(s, q).mean()


def _kl_of(s: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(s.log_softmax(-1), q.softmax(-1), reduction="none").sum(-1)


def shifted(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Both sets of logits without the last of each sequence."""
    s, q = F.linear(h.view(3, -1, D), W)[:, :-1], frozen(t.view(3, -1, E), U)[:, :-1, :]
    kept = mask.view(3, -1)[:, 1:]
    return (_kl_of(s, q / 2) * kept).sum() / kept.sum()


def shifted_and_flat(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """The first of each is left out here, and rows are flattened between."""
    s, q = F.linear(h.view(3, -1, D), W)[:, 1:], frozen(t.view(3, -1, E), U)[:, 1:].contiguous().view(-1, V)
    log_q = q - torch.logsumexp(q, -1, keepdim=True)
    return -(log_q.exp() * s.reshape(-1, V).log_softmax(-1)).sum(-1).mean()


def log_p(z: Tensor) -> Tensor:
    return z - log_sum_exp(z)[..., None]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Of logits, for each row: sum_i p_i (log p_i - log q_i)."""
    return (log_p(p).exp() * (log_p(p) - log_p(q))).sum(-1)


def entropy_of(p: Tensor, q: Tensor) -> Tensor:
    return -(log_p(p).exp() * log_p(q)).sum(-1)


def exactly(formula: Callable[[Tensor, Tensor, Tensor], Tensor], biased: bool = False) -> Loss:
    def exact(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        q = torch.einsum("nd,vd->nv", t, U).detach()
        return formula(torch.einsum("nd,vd->nv", h, W), q + b.detach() if biased else q, mask)

    return exact


def exactly_shifted(s: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    kept = mask.view(3, -1)[:, 1:]
    return (kl(q.view(3, -1, V)[:, :-1] / 2, s.view(3, -1, V)[:, :-1]) * kept).sum() / kept.sum()


def exactly_flat(s: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return entropy_of(q.view(3, -1, V)[:, 1:], s.view(3, -1, V)[:, 1:]).mean()


def labelled(s: Tensor, mask: Tensor) -> Tensor:
    rows = log_sum_exp(s) - s[torch.arange(len(s)), torch.arange(len(s)) % V]
    return (rows * mask).sum() / mask.sum()


CASES: dict[str, tuple[Loss, Loss]] = {
    "forward": (forward_kl, exactly(lambda s, q, mask: 4 * kl(q / 2, s / 2).mean())),
    "forward, masked": (
        masked_forward_kl,
        exactly(lambda s, q, mask: (kl(q, s) * mask).sum() / mask.sum(), biased=True),
    ),
    "soft cross entropy": (soft_cross_entropy, exactly(lambda s, q, mask: entropy_of(q, s).mean())),
    "reverse, masked": (
        reverse_kl,
        exactly(lambda s, q, mask: (kl(s, q) * mask).sum() / mask.sum(), biased=True),
    ),
    "by hand": (by_hand, exactly(lambda s, q, mask: entropy_of(3 * torch.tanh(q / 3), s).mean())),
    "sure rows": (
        sure_rows,
        exactly(lambda s, q, mask: (entropy_of(q, s) * log_p(q).exp().amax(-1)).mean()),
    ),
    "with entropies": (
        with_entropies,
        exactly(
            lambda s, q, mask: (kl(q, s) * log_p(q).exp().amax(-1)).mean() + 0.1 * entropy_of(q, q).mean()
        ),
    ),
    "squared": (squared, exactly(lambda s, q, mask: kl(q, s).square().mean())),
    "shifted": (shifted, exactly(exactly_shifted)),
    "shifted and flat": (shifted_and_flat, exactly(exactly_flat)),
    "beside labels": (beside_labels, exactly(lambda s, q, mask: labelled(s, mask) + kl(q, s).mean())),
}


def measured(f: Loss, inputs: Given, upstream: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    h, W = (x.detach().clone().requires_grad_() for x in inputs[:2])
    value = f(h, W, *inputs[2:])
    value.backward(torch.full_like(value, upstream))
    assert h.grad is not None
    assert W.grad is not None
    return value.detach(), h.grad, W.grad


def check(f: Loss, name: str, inputs: Given, upstream: float = -2.5) -> None:
    loss, formula = CASES[name]
    exact = measured(formula, inputs.to(torch.float64), upstream)
    trio = measured(f, inputs, upstream), measured(loss, inputs, upstream), exact
    for ours, naive, right in zip(*trio, strict=True):
        assert_fair(ours, naive, right)


def in_chunks(loss: Loss, **options: object) -> tuple[Loss, Graphs]:
    return compile_without_codegen(loss, **{"strategy": "token_chunks", "memory_budget": BUDGET, **options})


@pytest.mark.parametrize(
    ("name", "dtype"), in_turns([*CASES], [torch.float64, torch.float32, torch.bfloat16])
)
def test_right_and_nowhere_whole(name: str, dtype: torch.dtype) -> None:
    """Nothing in the graphs is larger than the logits of a piece, the student's or the teacher's."""
    compiled, graphs = in_chunks(CASES[name][0])
    check(compiled, name, given().to(dtype))
    forward, backward = graphs.final
    sites = 2 if name == "with entropies" else 1
    assert counts() == {"token_chunks": sites}
    assert (pieces := graphs.pieces // sites) >= 2
    assert graphs.count(torch.ops.inductor_ce.logits.default) == 2 * pieces
    assert largest(forward) <= -(-N // pieces) * V
    assert max(saved(forward)) <= max(V * D, N * D, 3 * N)
    assert largest(backward) <= max(V * D, N * D)


@pytest.mark.parametrize("n", [57, 61])
def test_rows_that_are_no_multiple(n: int) -> None:
    compiled, _ = in_chunks(forward_kl)
    check(compiled, "forward", given(n).to(torch.float64))


def test_symbolic_rows() -> None:
    compiled, graphs = in_chunks(masked_forward_kl, dynamic=True)
    for n in (60, 35):
        check(compiled, "forward, masked", given(n).to(torch.float64))
    assert len(graphs.final) == 2
    assert counts() == {"token_chunks": 1}
    assert graphs.count(torch.ops.inductor_ce.logits.default) == 2 * graphs.pieces


@pytest.mark.parametrize("name", ["forward, masked", "reverse, masked", "squared"])
def test_without_gradients(name: str) -> None:
    loss, formula = CASES[name]
    compiled, graphs = in_chunks(loss)
    inputs = given()
    with torch.no_grad():
        ours = compiled(*inputs)
    assert counts() == {"forward_only": 1}
    assert_fair(ours, loss(*inputs), formula(*inputs.to(torch.float64)))
    (forward,) = graphs.final
    assert largest(forward) <= -(-N // graphs.pieces) * V


def test_a_loop_over_chunks() -> None:
    """As users write it: each chunk has its own teacher's logits, and all are done one after another."""

    def loop(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        parts = zip(h.chunk(3), t.chunk(3), strict=True)
        return sum(forward_kl(x, W, y, U, b, mask) for x, y in parts) / 3

    compiled, graphs = compile_without_codegen(loop)
    check(compiled, "forward", given())
    assert counts() == {"token_chunks": 3}
    assert largest(graphs.final[0]) == N // 3 * V


@pytest.mark.with_all("two heads in pieces, test_head_sides.py")
def test_generated_code() -> None:
    compiled, _ = compile_with_codegen(squared, strategy="token_chunks", memory_budget=BUDGET)
    check(compiled, "squared", given())
    assert counts() == {"token_chunks": 1}


@pytest.mark.parametrize("loss", [reverse_kl, *[soft_cross_entropy, masked_forward_kl] * EVERYTHING])
def test_code_for_a_gpu(loss: Loss) -> None:
    """Of the size of a piece there is nothing but the logits of both, the student's to be overwritten."""
    compiled, graphs = in_chunks(loss, memory_budget=2.0)
    measured(compiled, given().to(torch.bfloat16))
    assert counts() == {"token_chunks": 1}
    lowering.register()
    code = lower_after_passes(graphs.final[0], is_backward=False).code
    piece = N // graphs.pieces * V
    assert most_at_once(code, piece) == 0
    assert code.count("extern_kernels.inductor_ce_logits(") == 2 * graphs.pieces
    assert "libdevice.log(" not in "".join(loops_over(code, piece)), "of numbers in float64, for each class"


def loops_over(code: str, size: int) -> list[str]:
    """The kernels of so many elements."""
    kernels = re.findall(r"def (triton_\w+\(.*?)'''", code, re.DOTALL)
    sizes = [re.findall(r"\b(?:xnumel|r0_numel) = (\d+)", kernel) for kernel in kernels]
    return [k for k, of in zip(kernels, sizes, strict=True) if math.prod(map(int, of)) == size]


def test_it_is_told() -> None:
    h, W, *others = given()
    with inductor_ce.install(min_vocab=2, strategy="token_chunks", memory_budget=BUDGET):
        (site,) = inductor_ce.explain(forward_kl, h.requires_grad_(), W.requires_grad_(), *others).sites
    assert "the teacher's logits, and what is made of them, are those of the same rows" in site.plan
    assert site.rows == "targets are made of the teacher's logits of all rows"


# The teacher's best class, beside its weights


def best_of_logits(q: Tensor) -> Tensor:
    return q.argmax(-1)


def best_by_max(q: Tensor) -> Tensor:
    return torch.max(q, -1)[1]


def best_of_probabilities(q: Tensor) -> Tensor:
    return (q / 2).softmax(-1).argmax(-1)


@pytest.mark.parametrize("best", [best_of_logits, best_by_max, best_of_probabilities])
def test_its_best_class(best: Callable[[Tensor], Tensor]) -> None:
    """The first of those that are alike, as of logits that are whole numbers many are."""

    def loss(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        s, q = F.linear(h, W), frozen(t, U)
        return (_kl_of(s, q / 2) * mask).sum() / mask.sum(), best(q)

    inputs = Given(*(x.round() for x in given()[:5]), given().mask).to(torch.float64)
    compiled, graphs = in_chunks(loss)
    classes, wanted = (f(*inputs)[1] for f in (compiled, loss))
    assert torch.equal(classes, wanted)
    torch._dynamo.reset()
    ours, naive = (measured(lambda *x, f=f: f(*x)[0], inputs) for f in (compiled, loss))
    for each, right in zip(ours, naive, strict=True):
        assert_fair(each, right, right)
    assert largest(graphs.final[-2]) <= -(-N // 2) * V


def test_its_best_class_as_a_label() -> None:
    """The student's loss waits for it: the teacher stays whole, and the numbers are right."""

    def loss(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        s, q = F.linear(h, W), frozen(t, U)
        return _kl_of(s, q).mean() + F.cross_entropy(s, q.argmax(-1))

    inputs = given().to(torch.float64)
    compiled, _ = in_chunks(loss)
    for ours, naive in zip(measured(compiled, inputs), measured(loss, inputs), strict=True):
        assert_fair(ours, naive, naive)


def test_the_best_class_of_no_teacher_is_left() -> None:
    def loss(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        s = F.linear(h, W)
        return F.cross_entropy(s, torch.arange(len(mask))), frozen(t, U).argmax(-1)

    with inductor_ce.install(min_vocab=2):
        h, W, *others = given()
        report = inductor_ce.explain(loss, h.requires_grad_(), W.requires_grad_(), *others)
    assert [site.form for site in report.sites] == ["mean[y != -100](lse - pick(y))"]
    assert not report.misses


# The teacher stays whole


def returned(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    q = frozen(t, U)
    return _kl_of(F.linear(h, W), q).mean(), q


def over_rows(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    q = frozen(t, U)
    return _kl_of(F.linear(h, W), q).mean(), q.cumsum(0)[-1]


def rolled(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Rows of the teacher are moved: those of a piece are not made of the same rows."""
    q = frozen(t, U).roll(1, 0)
    return (_kl_of(F.linear(h, W), q).mean(),)


def of_the_next(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Another end is cut off the teacher's sequences than off the student's."""
    s, q = F.linear(h.view(3, -1, D), W)[:, :-1], frozen(t.view(3, -1, E), U)[:, 1:]
    return (_kl_of(s, q).mean(),)


def each_its_own(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """A temperature for each of the rows that are left."""
    s, q = F.linear(h.view(3, -1, D), W)[:, :-1], frozen(t.view(3, -1, E), U)[:, :-1]
    return (_kl_of(s, q / (1 + mask.view(3, -1)[:, 1:, None])).mean(),)


def of_both(h: Tensor, W: Tensor, t: Tensor, U: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The student's logits are mixed into the targets."""
    s = F.linear(h, W)
    return (-((frozen(t, U) + s.detach()).softmax(-1) * s.log_softmax(-1)).sum(-1).mean(),)


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (returned, "they are returned"),
        (over_rows, "they are read by cumsum as well"),
        (of_the_next, "rows that were cut off are not put back as they were"),
        (each_its_own, "what is left of the rows is combined with numbers for them"),
        (rolled, "index may bring rows to other places"),
    ],
)
def test_left_whole(loss: Callable[..., tuple[Tensor, ...]], why: str) -> None:
    """The student's logits are in pieces, the teacher's are not, and `explain` says why."""
    inputs = given().to(torch.float64)
    compiled, _ = in_chunks(lambda *given: loss(*given)[0])
    assert_fair(compiled(*inputs), loss(*inputs)[0], loss(*inputs)[0])
    torch._dynamo.reset()
    h, W, *others = inputs
    (site,) = inductor_ce.explain(loss, h.requires_grad_(), W.requires_grad_(), *others).sites
    assert site.strategy == "token_chunks"
    assert "of the same rows" not in site.plan
    assert f"the teacher's logits are whole: {why}" in site.plan


def test_targets_of_both_are_no_teacher() -> None:
    """They are made of the student's logits as well, which are whole then."""
    inputs = given().to(torch.float64)
    compiled, graphs = in_chunks(lambda *given: of_both(*given)[0])
    ours, naive = (measured(f, inputs) for f in (compiled, lambda *given: of_both(*given)[0]))
    assert all(torch.allclose(o, n) for o, n in zip(ours, naive, strict=True))
    assert largest(graphs.final[0]) == N * V


def test_slabs_leave_it_whole() -> None:
    """A loss for each token has upstream gradients of its own."""
    compiled, _ = in_chunks(lambda *given: _kl_of(F.linear(*given[:2]), frozen(*given[2:4])))
    inputs = given().to(torch.float64)
    h, W = (x.clone().requires_grad_() for x in inputs[:2])
    upstream = torch.arange(N).double().cos()
    (compiled(h, W, *inputs[2:]) * upstream).sum().backward()
    assert counts() == {"vocab_slabs": 1}
    again, weight = (x.clone().requires_grad_() for x in inputs[:2])
    (kl(inputs.t @ inputs.U.t(), again @ weight.t()) * upstream).sum().backward()
    torch.testing.assert_close(h.grad, again.grad)
    torch.testing.assert_close(W.grad, weight.grad)
