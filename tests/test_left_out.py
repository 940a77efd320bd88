"""Entries that masks leave out: distillation where logits are finite, entropies of what is allowed."""

import math
from collections.abc import Callable
from typing import Any

import gallery
import pytest
import torch
import torch.nn.functional as F
from gallery import check_numbers
from harness import compile_rewritten, compile_with_codegen, compile_without_codegen, misses, sites
from pairwise import in_turns
from test_recognise import explained
from torch import Tensor
from torch.distributions import Categorical

N, D, V, PADDED = 16, 12, 60, 52


def inputs() -> tuple[Tensor, ...]:
    """Hidden states, a weight, a teacher's logits, labels, and which classes are allowed."""
    h, W = torch.randn(N, D, requires_grad=True), (torch.randn(V, D) / 2).requires_grad_()
    t, y = torch.randn(N, V), torch.randint(8, (N,))
    allowed = torch.rand(N, V) > 0.3
    allowed[:, :8] = True
    return h, W, t, y, allowed


def logits(h: Tensor, W: Tensor, padded: bool = False) -> Tensor:
    z = F.linear(h, W)
    return torch.where(torch.arange(V) < PADDED, z, -math.inf) if padded else z


def forward_kl(z, t, y, allowed):
    q, infinite = t.softmax(-1), torch.isinf(z)
    return -torch.masked_fill(q * z.log_softmax(-1), infinite, 0).sum(-1).mean()


def forward_kl_where(z, t, y, allowed):
    return -torch.where(z.isneginf() | ~torch.isfinite(z), 0.0, t.softmax(-1) * z.log_softmax(-1)).sum(-1)


def forward_kl_of_allowed(z, t, y, allowed):
    kept = allowed & (z != -math.inf)
    return -torch.where(kept, t.softmax(-1) * z.log_softmax(-1), 0.0).sum(-1).mean()


def warm_forward_kl(z, t, y, allowed):
    infinite, warm = torch.isinf(z), 0.5 * (z.float() if z.dtype != torch.float64 else z) / 1.5
    return -torch.masked_fill((t / 3).softmax(-1) * warm.log_softmax(-1), infinite, 0).sum(-1).mean()


def reverse_kl(z, t, y, allowed):
    p, infinite = z.softmax(-1), torch.isinf(t) | torch.isinf(z)
    products = torch.masked_fill(p * t.log_softmax(-1), infinite, 0)
    products -= torch.masked_fill(p * z.log_softmax(-1), infinite, 0)
    return -products.sum(-1).mean()


def divergence_of_allowed(z, t, y, allowed):
    return F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="none").masked_fill(~allowed, 0).sum(-1)


def teachers_infinities(z, t, y, allowed):
    return -torch.masked_fill(t.softmax(-1) * z.log_softmax(-1), torch.isinf(t), 0).sum(-1).mean()


def infinities_of_both(z, t, y, allowed):
    return -torch.masked_fill(t.softmax(-1) * z.log_softmax(-1), torch.isinf(z + t), 0).sum(-1).mean()


def several_positives(z, t, y, allowed):
    return -(torch.where(allowed, z.log_softmax(-1), 0.0).sum(-1) / (allowed.sum(-1) + 1)).mean()


def entropy_of_allowed(z, t, y, allowed):
    policy = Categorical(logits=torch.where(allowed, z, -1e8), validate_args=False)
    entropy = -torch.where(allowed, policy.logits * policy.probs, 0.0).sum(-1)
    return (-policy.log_prob(y) - 0.01 * entropy).mean()


def entropy_of_filled(z, t, y, allowed):
    logp = z.masked_fill(~allowed, -1e9).log_softmax(-1)
    return F.nll_loss(logp, y) + 0.01 * (logp.exp() * logp).masked_fill(~allowed, 0).sum(-1).mean()


def entropy_where_finite(z, t, y, allowed):
    logp = z.log_softmax(-1)
    return -torch.where(torch.isneginf(z), 0.0, logp.exp() * logp).sum(-1).mean()


def allowed_mass(z, t, y, allowed):
    p = z.softmax(-1)
    return F.cross_entropy(z, y) - torch.log(torch.where(allowed, p, 0).sum(-1)).mean()


def of_classes(z, t, y, allowed):
    p = z.softmax(-1)
    return (p * z.log_softmax(-1)).masked_fill(torch.arange(V) % 7 == 3, 0).sum(-1).mean()


FUNCTIONS = [
    *(forward_kl, forward_kl_where, forward_kl_of_allowed, reverse_kl, entropy_of_allowed, entropy_of_filled),
    *(entropy_where_finite, allowed_mass, divergence_of_allowed, teachers_infinities, several_positives),
    warm_forward_kl,
]
OF_LOGITS = [forward_kl, warm_forward_kl, forward_kl_where, forward_kl_of_allowed, infinities_of_both]
# A gradient of p (z - lse) at -inf is 0 times infinity in eager, and the limit in ours.
OF_PRODUCTS = (reverse_kl, entropy_where_finite)


def of_head(f: Callable[..., Any], padded: bool = False) -> Callable[..., Any]:
    def loss(h, W, *others):
        return f(logits(h, W, padded), *others)

    return loss


@pytest.mark.parametrize(
    ("f", "strategy"), in_turns([*FUNCTIONS, of_classes], ["token_chunks", "vocab_slabs", "materialise"])
)
def test_numbers(f, strategy):
    """Values and gradients of heads in pieces, where all logits are finite."""
    compiled, graphs = compile_without_codegen(of_head(f), strategy=strategy, memory_budget=0.5)
    args = inputs()
    check_numbers(gallery.run(compiled, args), of_head(f), args)
    assert (sites(), misses()) == (1, 0)
    assert graphs.pieces > 1 or strategy == "materialise", graphs.report


@pytest.mark.in_turns
@pytest.mark.parametrize("f", OF_LOGITS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("strategy", ["token_chunks", "vocab_slabs"])
def test_a_padded_vocabulary(f, strategy):
    """Columns of -inf have no part in it, nor a gradient."""
    compiled, _ = compile_without_codegen(of_head(f, padded=True), strategy=strategy, memory_budget=0.5)
    args = inputs()
    check_numbers(gallery.run(compiled, args), of_head(f, padded=True), args)
    assert (sites(), misses()) == (1, 0)


# What is infinite, and rows of which nothing is left


def hard() -> tuple[Tensor, ...]:
    """Logits and a teacher's with columns of -inf, rows of -inf or NaN; rows in which nothing is allowed."""
    torch.manual_seed(0)
    _, _, t, y, allowed = inputs()
    z, t = torch.randn(N, V).double(), t.double()
    z[:, PADDED:] = -math.inf
    allowed[:, PADDED:] = False
    t[:8, PADDED:] = -math.inf
    z[3], z[5, 3], z[6, 2], z[7, 1:] = -math.inf, math.nan, math.inf, -math.inf
    allowed[3], allowed[4], allowed[7, 1:], y[7] = False, False, False, 0
    return z.requires_grad_(), t, y, allowed


def divergence_where_finite(z, t, y, allowed):
    return F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="none").masked_fill(torch.isinf(z), 0).sum(-1)


def filled_with_a_number(z, t, y, allowed):
    logp = z.log_softmax(-1)
    return -(t.softmax(-1) * torch.where(allowed, logp, -20.0)).sum(-1).mean()


def weighed_after(z, t, y, allowed):
    return -(t.softmax(-1) * torch.where(allowed, z.log_softmax(-1), 0.0)).sum(-1).mean()


OF_ENTRIES = [divergence_where_finite, filled_with_a_number, weighed_after]


@pytest.mark.parametrize("f", [*FUNCTIONS, infinities_of_both, *OF_ENTRIES], ids=lambda f: f.__name__)
def test_each_row_is_as_eager_has_it(f):
    """Its value NaN for NaN, and its gradient; of products of probabilities that is 0 where p is."""
    compiled, _ = compile_without_codegen(f)
    z, *others = hard()
    for i in range(N):
        args = (z.detach()[i : i + 1].clone().requires_grad_(), *(x[i : i + 1] for x in others))
        ours, eager = gallery.run(compiled, args), gallery.run(f, args)
        torch.testing.assert_close(ours.results, eager.results, equal_nan=True)
        ours_dz, eager_dz = ours.gradients[0], eager.gradients[0]
        if f in OF_PRODUCTS:
            ours_dz = torch.where(eager_dz.isnan(), eager_dz, ours_dz)
        torch.testing.assert_close(ours_dz, eager_dz, equal_nan=True)
    assert sites() == 1


def test_generated_code_does_not_look_at_what_is_left_out():
    """With weights of NaN, which compilers may not take for numbers."""
    z, *others = (x[8:] for x in hard())
    args = (z.detach().requires_grad_(), *others)
    compiled, _ = compile_with_codegen(divergence_of_allowed)
    ours, eager = gallery.run(compiled, args), gallery.run(divergence_of_allowed, args)
    torch.testing.assert_close(ours.results, eager.results)
    torch.testing.assert_close(ours.gradients[0], eager.gradients[0])
    assert sites() == 1


def test_the_gradient_of_an_infinity_is_the_limit():
    """Eager has NaN in every class of such a row."""
    z, t, y, allowed = (x[8:] for x in hard())
    z = z.detach().requires_grad_()
    compiled, _ = compile_without_codegen(entropy_where_finite)
    (ours,) = torch.autograd.grad(compiled(z, t, y, allowed), z)
    within = z.detach()[:, :PADDED].clone().requires_grad_()
    logp = within.log_softmax(-1)
    (expected,) = torch.autograd.grad(-(logp.exp() * logp).sum(-1).mean(), within)
    torch.testing.assert_close(ours, F.pad(expected, (0, V - PADDED)))


def test_a_mask_of_classes_and_weights_beside_one_row():
    """[V], where the logits are [1, V]."""

    def f(z, cost):
        p = z.softmax(-1)
        return (p * z.log_softmax(-1)).masked_fill(torch.arange(V) % 7 == 3, 0).sum() + (p * cost).sum()

    compiled, _ = compile_without_codegen(f)
    args = torch.randn(1, V, requires_grad=True), torch.rand(V)
    check_numbers(gallery.run(compiled, args), f, args)
    assert (sites(), misses()) == (1, 0)


def cold_forward_kl(z, t, y, allowed):
    """What is finite may be infinite when it is divided by little: the mask stays as it is."""
    return -torch.masked_fill(t.softmax(-1) * (z / 0.5).log_softmax(-1), torch.isinf(z), 0).sum(-1).mean()


def shifted_forward_kl(z, t, y, allowed):
    return -torch.masked_fill(t.softmax(-1) * (z + t).log_softmax(-1), torch.isinf(z), 0).sum(-1).mean()


@pytest.mark.parametrize("f", [cold_forward_kl, shifted_forward_kl], ids=lambda f: f.__name__)
def test_a_mask_of_other_logits_is_brought_along(f):
    compiled, graphs = compile_without_codegen(f)
    z = torch.randn(N, V)
    z[:, PADDED:] = -math.inf
    z[:, 0] = -3e38  # infinite when it is divided by 0.5, and not before
    args = (z.requires_grad_(), *inputs()[2:])
    ours, eager = gallery.run(compiled, args), gallery.run(f, args)
    torch.testing.assert_close(ours.results, eager.results)
    torch.testing.assert_close(ours.gradients[0], eager.gradients[0], equal_nan=True)
    assert ["finite" in site.form for site in graphs.report.sites] == [False]


# Of a sum over all


def others_by_fill(z, y):
    return z.log_softmax(-1).masked_fill(F.one_hot(y, V).bool(), 0).sum(-1).mean()


def others_by_zero(z, y):
    others = torch.ones_like(z).scatter(1, y[:, None], 0.0)
    return -(z.log_softmax(-1) * others).sum(-1).mean() / (V - 1)


def others_by_scatter(z, y):
    return z.log_softmax(-1).scatter(1, y[:, None], 0.0).sum(-1).mean()


def others_by_difference(z, y):
    log_p = z.log_softmax(-1)
    return (log_p.sum(-1) - log_p.gather(1, y[:, None])[:, 0]).square().mean()


def others_where(z, y):
    is_other = torch.arange(V) != y[:, None]
    return -torch.where(is_other, z.log_softmax(-1), 0.0).mean(-1).square().mean()


def large_margin(z, y):
    """The cross entropy of all other classes to the mean of their log-probabilities and to themselves."""
    others = 1.0 - F.one_hot(y, V).to(z.dtype)
    p, log_p = z.softmax(-1), z.log_softmax(-1)
    return ((p - 1.0 / (V - 1)) * log_p * others).sum(-1).mean()


def smoothed_but_for_padding(z, y):
    target = torch.full_like(z, 0.1 / (V - 2)).scatter(1, (y + 9)[:, None], 0.9)
    target[:, 0] = 0
    return F.kl_div(z.log_softmax(-1), target, reduction="batchmean")


def masked(f, logit):
    """The loss of logits of which the one that it leaves out is a mask's."""

    def loss(z, y):
        padding = torch.zeros_like(y) if f is smoothed_but_for_padding else y
        return f(z.scatter(1, padding[:, None], logit), y)

    return loss


MASKED = [-1e9, torch.finfo(torch.float32).min]


@pytest.mark.parametrize("f", [others_by_zero, smoothed_but_for_padding], ids=lambda f: f.__name__)
@pytest.mark.parametrize("logit", MASKED)
def test_a_class_of_weight_0_is_not_taken_away_from_all(f, logit):
    loss, args = masked(f, logit), (torch.randn(N, V, requires_grad=True), inputs()[3])
    compiled, _ = compile_without_codegen(loss)
    check_numbers(gallery.run(compiled, args), loss, args)
    assert sites() == 1


@pytest.mark.parametrize(
    "f", [others_by_fill, others_by_scatter, others_where, large_margin], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("logit", [*MASKED, -math.inf])
def test_a_class_that_is_0_beside_all(f, logit):
    """Beside a mask's logit nothing would be left of the others, were it taken away from a sum of all."""
    loss, args = masked(f, logit), (torch.randn(N, V, requires_grad=True), inputs()[3])
    compiled, _ = compile_rewritten(loss)
    if f is large_margin and logit == -math.inf:
        assert torch.stack([compiled(*args), loss(*args)]).isnan().all()
    else:
        check_numbers(gallery.run(compiled, args), loss, args)
    assert (sites(), misses()) == (1, 0)


@pytest.mark.parametrize("logit", MASKED)
def test_an_entropy_whose_weights_are_above_1(logit):
    """A probability of 0 times the lowest logarithm is 0, whatever a weight would make of that alone."""

    def loss(z, y):
        z, weights = z.scatter(1, y[:, None], logit), torch.linspace(3, 0.5, V)
        return -(z.softmax(1) * z.log_softmax(1) * weights).sum(1).mean()

    args = (torch.randn(N, V, requires_grad=True), inputs()[3])
    compiled, _ = compile_rewritten(loss)
    check_numbers(gallery.run(compiled, args), loss, args)
    assert (sites(), misses()) == (1, 0)


def additive_margin(z, y):
    """A denominator by hand, of exponentials."""
    own = torch.diagonal(z.transpose(0, 1)[y]) - 18
    others = (torch.exp(z) * (1 - F.one_hot(y, V))).sum(1)
    return (torch.log(own.exp() + others) - own).mean()


def additive_margin_where(z, y):
    own = z.gather(1, y[:, None])[:, 0] - 18
    others = torch.where(F.one_hot(y, V).bool(), 0.0, torch.exp(z)).sum(1)
    return (torch.log(own.exp() + others) - own).mean()


def additive_margin_scattered(z, y):
    own = z.gather(1, y[:, None])[:, 0] - 18
    others = torch.exp(z).scatter(1, y[:, None], 0).sum(1)
    return (torch.log(own.exp() + others) - own).mean()


def additive_margin_of_pixels(z, y):
    """The classes in the middle."""
    z, y = z.view(4, 4, V).transpose(1, 2), y.view(4, 1, 4)
    own = z.gather(1, y)[:, 0] - 18
    others = torch.exp(z).scatter(1, y, 0).sum(1)
    return (torch.log(own.exp() + others) - own).mean()


def probability_of_others(z, y):
    """Unlike 1 - p, which the user may write as well."""
    return (z.softmax(-1) * torch.ones_like(z).scatter(1, y[:, None], 0.0)).sum(-1).log().mean()


MARGINS = [additive_margin, additive_margin_where, additive_margin_scattered, additive_margin_of_pixels]
MARGINS += [probability_of_others]


@pytest.mark.parametrize("f", MARGINS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("logit", [22.0, -math.inf])
def test_a_probability_of_nearly_1_is_not_taken_away_from_all(f, logit):
    loss, args = (masked(f, logit), (torch.randn(N, V, requires_grad=True), inputs()[3]))
    compiled, _ = compile_rewritten(loss)
    if f is not probability_of_others and logit == -math.inf:
        assert torch.stack([compiled(*args), loss(*args)]).isinf().all()
    else:
        check_numbers(gallery.run(compiled, args), loss, args)
    assert (sites(), misses()) == (1, 0)


def test_a_probability_that_is_taken_away_from_each_is_left():
    """Each difference is exact, but not that of their sums."""

    def loss(z, y):
        p = z.softmax(-1)
        return (p - p * F.one_hot(y, V)).sum(-1).log().mean()

    compiled, _ = compile_rewritten(loss)
    args = torch.randn(N, V).scatter(1, inputs()[3][:, None], 22.0).requires_grad_(), inputs()[3]
    check_numbers(gallery.run(compiled, args), loss, args)
    assert (sites(), misses()) == (0, 1)


def test_one_minus_a_probability_stays_so():
    """And is no reason to bring the target along."""

    def loss(z, y):
        return (1 - (z.softmax(-1) * F.one_hot(y, V)).sum(-1)).square().mean()

    compiled, graphs = compile_rewritten(loss)
    args = torch.randn(N, V, requires_grad=True), inputs()[3]
    check_numbers(gallery.run(compiled, args), loss, args)
    assert [site.form for site in graphs.report.sites] == ["1 - exp(pick(y) - lse)"]


def test_a_head_with_a_margin():
    """Cosines that are picked from before they are scaled, and whose exponentials are summed after."""

    def loss(h, W, y):
        cosines = F.linear(F.normalize(h), F.normalize(W))
        own = 8 * (torch.diagonal(cosines.transpose(0, 1)[y]) - 0.3)
        others = torch.exp(8 * cosines) * torch.ones_like(cosines).scatter_(1, y[:, None], 0.0)
        return (torch.log(own.exp() + others.sum(1)) - own).mean()

    h, W, _, y, _ = inputs()
    compiled, graphs = compile_without_codegen(loss, strategy="token_chunks", memory_budget=0.9)
    check_numbers(gallery.run(compiled, (h, W, y)), loss, (h, W, y))
    assert (sites(), misses()) == (2, 0)
    assert graphs.pieces > 1


@pytest.mark.parametrize(
    ("f", "strategy"), in_turns([others_by_fill, large_margin], ["token_chunks", "vocab_slabs"])
)
def test_a_head_whose_label_is_0_beside_all(f, strategy):
    """As in large-margin softmax: the label's logit is lowered, and is no part of the sum."""

    def loss(h, W, y):
        z = F.linear(h, W)
        return f(z - 1e6 * F.one_hot(y, V).to(z.dtype), y) + F.cross_entropy(z, y)

    h, W, _, y, _ = inputs()
    compiled, graphs = compile_without_codegen(loss, strategy=strategy, memory_budget=0.9)
    check_numbers(gallery.run(compiled, (h, W, y)), loss, (h, W, y))
    assert misses() == 0
    assert graphs.pieces > 2


@pytest.mark.parametrize("logit", [0.0, *MASKED])
def test_a_class_that_is_taken_away_from_all(logit):
    loss, args = masked(others_by_difference, logit), (torch.randn(N, V, requires_grad=True), inputs()[3])
    compiled, _ = compile_rewritten(loss)
    check_numbers(gallery.run(compiled, args), loss, args)
    (miss,) = explained(loss, *args).misses
    assert "takes it away" in miss.message


def test_a_class_that_is_0_beside_one_that_is_taken_away():
    """The one is read anew, the other is left as it was, and told."""

    def loss(z, y):
        return others_by_fill(z.tanh(), y) + others_by_difference(z, y)

    args = torch.randn(N, V, requires_grad=True), inputs()[3]
    compiled, _ = compile_rewritten(loss)
    check_numbers(gallery.run(compiled, args), loss, args)
    assert (sites(), misses()) == (1, 1)


def test_several_labels_beside_a_sum_over_all():
    def f(z, y, share=1 / V):
        log_p = z.log_softmax(-1)
        labels = torch.stack([y, y + 1], 1)
        return -((1 - share) * log_p.gather(1, labels) + share * log_p.sum(-1, keepdim=True)).mean()

    args = torch.randn(N, V, requires_grad=True), inputs()[3]
    compiled, _ = compile_without_codegen(f)
    check_numbers(gallery.run(compiled, args), f, args)
    assert sites() == 1


# Left


def edited_twice(z, t, y, allowed):
    p, infinite = z.softmax(-1), torch.isinf(z)
    products = torch.masked_fill(p * z.log_softmax(-1), infinite, 0)
    held = products.view(-1)
    products -= p
    return products.sum(-1).mean() + held.sum()


LEFT = {edited_twice: "goes into"}


@pytest.mark.parametrize("f", LEFT, ids=lambda f: f.__name__)
def test_left(f):
    """With a reason, and right."""
    compiled, _ = compile_without_codegen(f)
    z, t, y, allowed = hard()
    ours, eager = gallery.run(compiled, (z, t, y, allowed)), gallery.run(f, (z, t, y, allowed))
    assert sites() == 0
    torch.testing.assert_close(ours.results, eager.results, equal_nan=True)
    (miss, *_) = explained(f, z, t, y, allowed).misses
    assert LEFT[f] in miss.message
