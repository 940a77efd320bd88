"""Kept beside: log-probabilities that are returned, topped or stored, and the loss from the logits."""

from collections.abc import Callable
from typing import Any

import gallery
import pytest
import torch
import torch.nn.functional as F
from gallery import check_numbers
from harness import compile_rewritten, compile_without_codegen, misses, sites
from kernels import backwards_at_once
from torch import Tensor

import inductor_ce
from inductor_ce import Reason, ops

N, D, V = 16, 8, 40


def inputs() -> tuple[Tensor, ...]:
    h, W = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return h, W, torch.randint(V, (N,)), torch.zeros(N, V)


def returned(h, W, y, store):
    logp = F.log_softmax(F.linear(h, W), -1)
    return F.nll_loss(logp, y), logp


def probabilities_returned(h, W, y, store):
    logp = F.log_softmax(F.linear(h, W), -1)
    return F.nll_loss(logp, y), logp.exp()


def softmax_returned(h, W, y, store):
    p = F.softmax(F.linear(h, W), -1)
    return -p.gather(1, y[:, None]).log().mean(), p


def some_returned(h, W, y, store):
    logp = F.log_softmax(F.linear(h, W).view(2, N // 2, V), -1)
    return F.nll_loss(logp.view(-1, V), y), logp[:, -1]


def topped(h, W, y, store):
    logp = F.log_softmax(F.linear(h, W), -1)
    best, which = logp.topk(5)
    return F.nll_loss(logp, y), best, which


def topped_with_a_gradient(h, W, y, store):
    logp = F.log_softmax(F.linear(h, W), -1)
    return F.nll_loss(logp, y) + logp.topk(5).values.square().mean()


def ranked(h, W, y, store):
    logp = F.log_softmax(F.linear(h, W), -1)
    return F.nll_loss(logp, y), logp.argsort(-1)[:, :3]


def logged(h, W, y, store):
    logp = F.log_softmax(F.linear(h, W), -1)
    with torch.no_grad():
        spread = (logp.exp() ** 3).sum(0)
    return F.nll_loss(logp, y), spread


def detached(h, W, y, store):
    logp = F.log_softmax(F.linear(h, W), -1)
    return F.nll_loss(logp, y, reduction="none"), logp.detach().sigmoid().mean(0)


def stored(h, W, y, store):
    logp = F.log_softmax(F.linear(h, W), -1)
    with torch.no_grad():
        store[:] = logp
    return F.nll_loss(logp, y), store * 2


def of_chosen_rows(h, W, y, store):
    logp = F.log_softmax(F.linear(h, W), -1)
    rows = y[:5] % N
    return F.nll_loss(logp[rows], y[rows]), logp


def detached_at_the_end(h, W, y, store):
    logp = F.log_softmax(F.linear(h, W), -1)
    spread = (logp.exp() * logp.sin().square()).sum(-1)
    return F.nll_loss(logp, y), spread.sqrt().mean().detach()


FUNCTIONS = [
    *(returned, probabilities_returned, softmax_returned, some_returned, topped, topped_with_a_gradient),
    *(ranked, logged, detached, stored, of_chosen_rows, detached_at_the_end),
]


def check(f: Callable[..., Any], **options: Any) -> Any:
    """Results, and gradients of all of them, the kept ones too, are as near to float64 as eager's."""
    compiled, graphs = compile_without_codegen(f, **options)
    args = inputs()
    check_numbers(gallery.run(compiled, args), f, args)
    return graphs


@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_kept_beside_a_loss(f):
    graphs = check(f, strategy="token_chunks", memory_budget=0.5)
    assert (sites(), misses()) == (1, 0)
    assert graphs.pieces == 1, "what is kept needs all logits"
    assert graphs.count(ops.ROW_GRAD) == 1
    (site,) = graphs.report.sites
    assert "of all classes" in site.kept


def test_explain_says_what_is_kept():
    inductor_ce.install(min_vocab=2)
    report = inductor_ce.explain(returned, *inputs())
    assert "    kept       log_softmax of all classes [16x40], returned\n" in f"{report}\n"
    (site,) = inductor_ce.explain(topped, *inputs()).sites
    assert site.kept.startswith("log_softmax of all classes [16x40], read by topk at test_kept.py:")
    (site,) = inductor_ce.explain(stored, *inputs()).sites
    assert "stored by setitem" in site.kept


def test_nothing_is_kept_of_a_loss_alone():
    def f(h, W, y, store):
        return F.nll_loss(F.log_softmax(F.linear(h, W), -1), y)

    inductor_ce.install(min_vocab=2)
    report = inductor_ce.explain(f, *inputs())
    assert report.sites[0].kept == ""
    assert "\n    kept" not in str(report)


def used_elementwise(h, W, y, store):
    logp = F.log_softmax(F.linear(h, W), -1)
    return F.nll_loss(logp, y) + torch.sin(logp + 2).sum()


def used_and_returned(h, W, y, store):
    logp = F.log_softmax(F.linear(h, W), -1)
    return F.nll_loss(logp, y) + torch.sin(logp + 2).sum(), logp


def half_detached(h, W, y, store):
    """What is logged has a gradient by another way."""
    logp = F.log_softmax(F.linear(h, W), -1)
    spread = (logp.exp() * logp.sin().square()).sum(-1).mean()
    return F.nll_loss(logp, y) + 0.1 * spread, spread.detach()


def soft_embeddings(h, W, y, store):
    p = F.softmax(F.linear(h, W), -1)
    return F.nll_loss(torch.log(p + 1e-3), y), p @ W


def soft_embeddings_detached(h, W, y, store):
    p = F.softmax(F.linear(h, W), -1)
    return -torch.log(p.gather(1, y[:, None]) + 1e-3).mean(), p.detach() @ W


def expected_costs(h, W, y, store):
    p = F.softmax(F.linear(h, W), -1)
    costs = (torch.arange(V) - torch.arange(V)[:, None]).abs() / V
    return F.nll_loss(p.log(), y), (p @ costs).gather(1, y[:, None])


def averaged_over_rows(h, W, y, store):
    p = F.softmax(F.linear(h, W), -1)
    average = p.mean(0)
    return -p[torch.arange(N), y].log().mean() + (average * average.log()).sum()


def cumulated(h, W, y, store):
    p = F.softmax(F.linear(h, W), -1)
    gap = p.cumsum(-1) - F.one_hot(y, V).cumsum(-1)
    return -p.gather(1, y[:, None]).log().mean() + gap.square().sum(-1).mean()


def edited_afterwards(h, W, y, store):
    logp = 2 * F.log_softmax(F.linear(h, W), -1)
    loss = -logp[torch.arange(N), y].mean()
    logp[:, 0] = 0
    return loss, logp @ W


def a_copy_edited(h, W, y, store):
    p = F.softmax(F.linear(h, W), -1)
    others = p.clone().scatter_(1, y[:, None], 0)
    return -torch.log(p.gather(1, y[:, None]) + 1e-3).mean(), others @ W


def straight_through(h, W, y, store):
    """The likeliest class is taken of what stays, and its gradient is that of all."""
    p = F.softmax(F.linear(h, W), -1)
    hard = F.one_hot(p.argmax(-1), V).to(p.dtype)
    return F.nll_loss(torch.log(p + 1e-3), y), (hard - p.detach() + p) @ W


def beside_sums_of_entries(h, W, y, store):
    p = F.softmax(F.linear(h, W), -1)
    entropy = -(p * torch.log(p + 1e-3)).sum(-1).mean()
    return (p - F.one_hot(y, V)).square().sum(-1).mean() - entropy, p @ W


def beside_a_divergence(h, W, y, store):
    p, q = F.softmax(F.linear(h, W), -1), F.softmax(F.linear(h, -W), -1)
    return (p * (p.log() - q.log())).sum(-1).mean(), p @ W, q.mean(0)


def mixed_with_the_classes(h, W, y, store):
    """A product that happens to have as many columns as there are classes."""
    p = F.softmax(F.linear(h, W), -1)
    return -p.gather(1, y[:, None]).log().mean(), p @ (W @ W.t())


WITH_A_GRADIENT = [
    *(soft_embeddings, soft_embeddings_detached, expected_costs),
    *(beside_sums_of_entries, beside_a_divergence),
]
# Whose backward sweeps all of what the loss is picked of in any case.
NOTHING_SPARED = [
    *(used_elementwise, used_and_returned, half_detached, averaged_over_rows, cumulated, edited_afterwards),
    *(a_copy_edited, mixed_with_the_classes),
]


def check_rewritten(f: Callable[..., Any]) -> inductor_ce.Report:
    """The same without what follows the rewrite."""
    compiled, rewritten = compile_rewritten(f)
    args = inputs()
    check_numbers(gallery.run(compiled, args), f, args)
    return rewritten.report


@pytest.mark.parametrize("f", WITH_A_GRADIENT, ids=lambda f: f.__name__)
def test_kept_with_a_gradient(f):
    report = check_rewritten(f)
    assert misses() == 0
    assert "of all classes" in report.sites[0].kept
    assert sites() == 1


@pytest.mark.parametrize("f", NOTHING_SPARED, ids=lambda f: f.__name__)
def test_left_where_no_sweep_is_spared(f):
    report = check_rewritten(f)
    assert sites() == 0
    assert report.misses[0].reason is Reason.LOGITS_ESCAPE


def test_kept_beside_a_class_that_is_chosen():
    """The likeliest class is taken of what stays, and the loss has a logarithm of its own."""
    assert "of all classes" in check_rewritten(straight_through).sites[0].kept


def no_gradient(h, W, y, store):
    logp = F.log_softmax(F.linear(h.detach(), W.detach()), -1)
    return F.nll_loss(logp, y) + 0 * h.sum() + 0 * W.sum(), logp


def test_left_where_nothing_is_gained():
    graphs = check(no_gradient)
    assert (sites(), misses()) == (0, 1)
    assert graphs.report.misses[0].reason is Reason.LOGITS_ESCAPE


def test_what_chooses_among_targets_is_no_miss():
    """Expected values of a distribution over bins, whose softmax is projected to other bins: C51."""

    def f(z: Tensor, t: Tensor, rewards: Tensor) -> Tensor:
        bins = torch.linspace(-1, 1, V)
        p = t.softmax(-1).detach()
        best = (p * bins).sum(-1).argmax(1)
        p = p[torch.arange(N), best]
        places = ((rewards[:, None] + 0.9 * bins).clamp(-1, 1) + 1) * (V - 1) / 2
        low, up, row = places.floor().long(), places.ceil().long(), torch.arange(N)[:, None] * V
        target = torch.zeros(N, V)
        target.view(-1).index_add_(0, (low + row).view(-1), (p * (up - places)).view(-1))
        target.view(-1).index_add_(0, (up + row).view(-1), (p * (places - low)).view(-1))
        return -(target * z.log_softmax(-1)).sum(-1).mean()

    args = torch.randn(N, V, requires_grad=True), torch.randn(N, 3, V, requires_grad=True), torch.randn(N)
    compiled, backend = compile_rewritten(f)
    actual, expected = (torch.autograd.grad(g(*args), args[0]) for g in (compiled, f))
    torch.testing.assert_close(actual, expected)
    assert (len(backend.report.sites), backend.report.misses) == (1, [])


def teacher(h, W, y, store):
    """A student's loss, and what is picked of the teacher's log-probabilities, which are its target."""
    target, logp = F.log_softmax(store, -1), F.log_softmax(F.linear(h, W), -1)
    ratio = torch.exp(logp.gather(1, y[:, None]) - target.gather(1, y[:, None]))
    return (target.exp() * (target - logp)).sum(-1).mean() + ratio.mean()


def test_what_is_picked_of_a_target_is_no_miss():
    check(teacher)
    assert (sites(), misses()) == (1, 0)


def test_what_is_picked_beside_a_loss_over_a_target_alone_is_told():
    """Log-probabilities without a gradient of which nothing else is made than what is returned."""

    def f(h, W, y, store):
        target = F.log_softmax(store, -1)
        return F.cross_entropy(F.linear(h, W), y) + F.nll_loss(target, y), target

    check(f)
    assert (sites(), misses()) == (1, 1)


def test_verified():
    graphs = check(topped, verify=True)
    assert graphs.report.sites[0].kept


@pytest.mark.with_all("the loops that a loss has without it, test_lowering.py")
def test_generated_code_has_the_numbers_too():
    inductor_ce.install(min_vocab=2)
    args = inputs()
    with backwards_at_once():
        check_numbers(gallery.run(torch.compile(returned), args), returned, args)
    assert sites() == 1


def rank_by_logits(z, y):
    return F.cross_entropy(z, y), (z > z.gather(1, y[:, None])).sum(-1)


def rank_by_scaled_logits(z, y):
    z = z / 0.7
    own = z.gather(1, y[:, None])
    return F.cross_entropy(z, y) + own.mean(), (z >= own).sum(-1)


def rank_by_probabilities(z, y):
    p = z.softmax(-1)
    own = p[torch.arange(len(z)), y]
    return -own.log().mean(), p.gt(own[:, None]).sum(-1)


def rank_by_log_probabilities(z, y):
    logp = z - z.logsumexp(-1, keepdim=True)
    own = logp.gather(1, y[:, None])
    return -own.mean(), (own < logp).sum(-1)


def rank_by_differences(z, y):
    p = z.softmax(-1)
    own = p.gather(1, y[:, None])
    return -own.log().mean(), ((p - own) > 0).sum(-1)


def rank_by_detached_differences(z, y):
    p = z.softmax(-1)
    own = p.gather(1, y[:, None])
    return -own.log().mean(), ((p.detach() - own) > 0).sum(-1)


def among_the_best(z, y):
    p = z.softmax(-1)
    own = p.gather(1, y[:, None])
    return -own.log().mean(), (own >= p.topk(5).values).sum(-1)


def where_the_best_is(z, y):
    p = z.softmax(-1)
    return F.cross_entropy(z, y), p == p.max(-1, keepdim=True).values


RANKS = [rank_by_logits, rank_by_scaled_logits, rank_by_probabilities, rank_by_log_probabilities]
RANKS += [rank_by_differences, rank_by_detached_differences, among_the_best, where_the_best_is]


@pytest.mark.parametrize("f", RANKS, ids=lambda f: f.__name__)
def test_what_is_compared_with_its_own_row_is_as_written(f):
    """The label is neither above nor below itself, to the bit."""
    z, y = torch.randn(500, V, requires_grad=True), torch.arange(500) % V
    compiled, _ = compile_rewritten(f)
    (loss, ours), (expected, ranks) = compiled(z, y), f(z, y)
    assert sites() == 1
    assert torch.equal(ours, ranks)
    torch.testing.assert_close(loss, expected)
    ours, expected = (torch.autograd.grad(x, z)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, expected)
