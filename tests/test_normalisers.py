"""Normalisers alone: energies, sums of exponentials, weighed or not, and labels' logits apart."""

import math
from collections.abc import Callable
from typing import Any

import gallery
import pytest
import torch
import torch.nn.functional as F
from gallery import check_numbers
from harness import compile_rewritten, compile_without_codegen, counters, misses, sites
from pairwise import in_turns
from torch import Tensor

from inductor_ce import Reason, ops

N, D, V = 16, 12, 60


def inputs() -> tuple[Tensor, ...]:
    """Hidden states, a weight, what columns are weighed by, and labels."""
    h, W = torch.randn(N, D, requires_grad=True), (torch.randn(V, D) / 2).requires_grad_()
    return h, W, torch.rand(V) + 0.1, torch.randint(V, (N,))


def energy(h, W, w, y):
    return -torch.logsumexp(F.linear(h, W), -1).mean()


def squared(h, W, w, y):
    return F.relu(3 + torch.logsumexp(h @ W.t(), -1)).square().sum()


def with_temperature(h, W, w, y):
    return -2.0 * torch.logsumexp(F.linear(h, W).float() / 2.0, dim=-1)


def apart(h, W, w, y):
    return (torch.logsumexp(F.linear(h, W), -1) - (h * W[y]).sum(-1)).mean()


def apart_of_sequences(h, W, w, y):
    h, y = h.view(2, N // 2, D), y.view(2, N // 2)
    own = torch.einsum("bsd,bsd->bs", h, F.embedding(y, W))
    return (F.linear(h, W).logsumexp(-1) - own).sum() / N


def biased_by_logarithms(h, W, w, y):
    return (torch.logsumexp(F.linear(h, W) + w.log(), -1) - (h * W[y]).sum(-1)).mean()


def summed_exponentials(h, W, w, y):
    own = torch.exp((h * W[y]).sum(-1))
    return -torch.log(own / (own + torch.exp(F.linear(h, W)).sum(-1))).mean()


def weighed_exponentials(h, W, w, y):
    return ((w * F.linear(h, W).exp()).sum(-1).log() - (h * W[y]).sum(-1)).mean()


def weighed_by_rows(h, W, w, y):
    kept = 1 - F.one_hot(y, V).float()
    return ((kept * w * (h @ W.t()).exp()).sum(-1) + (h * W[y]).sum(-1).exp()).log().mean()


def reweighted(h, W, w, y):
    neg = torch.exp(F.linear(h, W))
    imp = (1.0 * neg.log()).exp()
    return ((imp * neg).sum(-1) / imp.mean(-1)).log().mean()


def joined_by_logaddexp(h, W, w, y):
    own = (h * W[y]).sum(-1)
    return (torch.logaddexp(torch.logsumexp(F.linear(h, W), -1), own) - own).mean()


def two_thresholds(h, W, w, y):
    hot = F.one_hot(y, V).float()
    z = (1 - 2 * hot) * F.linear(h, W)
    zeros = torch.zeros_like(z[..., :1])
    neg = torch.cat([z - hot * 1e12, zeros], dim=-1)
    return torch.logsumexp(neg, dim=-1).mean()


def margin_and_queue(h, W, w, y):
    own = (h * W[y]).sum(-1, keepdim=True)
    return (torch.cat([own - 0.3, F.linear(h, W)], -1).logsumexp(-1) - own.squeeze(-1)).mean()


def of_all_but_one(h, W, w, y):
    """SupCon's: positives less the logarithm of a sum that leaves the row itself out."""
    z, others = F.linear(h, W), 1 - F.one_hot(y, V).float()
    z = z - z.amax(-1, keepdim=True).detach()
    log_p = z - torch.log((z.exp() * others).sum(-1, keepdim=True))
    positives = others * (w > w.median())
    return -((positives * log_p).sum(-1) / positives.sum(-1)).mean()


FUNCTIONS = [
    of_all_but_one,
    *(energy, squared, with_temperature, apart, apart_of_sequences, biased_by_logarithms),
    *(summed_exponentials, weighed_exponentials, weighed_by_rows, reweighted, joined_by_logaddexp),
    *(two_thresholds, margin_and_queue),
]


def check_head(f: Callable[..., Any], strategy: str, count: int) -> None:
    """Right, of so many sites and nothing missed, each in pieces where the strategy has them."""
    compiled, graphs = compile_without_codegen(f, strategy=strategy, memory_budget=0.5)
    args = inputs()
    check_numbers(gallery.run(compiled, args), f, args)
    assert (sites(), misses()) == (count, 0)
    assert graphs.pieces > count or strategy == "materialise", graphs.report


@pytest.mark.parametrize(
    ("f", "strategy"), in_turns(FUNCTIONS, ["token_chunks", "vocab_slabs", "materialise"])
)
def test_numbers(f, strategy):
    """Values and the gradients of hidden states and weight, where they come by two ways too."""
    check_head(f, strategy, 1)


@pytest.mark.parametrize("f", [energy, weighed_exponentials, reweighted], ids=lambda f: f.__name__)
def test_without_a_gradient(f):
    compiled, graphs = compile_without_codegen(torch.no_grad()(f), memory_budget=0.5)
    args = inputs()
    torch.testing.assert_close(compiled(*args), f(*args).detach())
    assert sites() == 1
    assert graphs.count(ops.ROW_GRAD) == 0


# Picked from the same product


def lowered_at_the_label(h, W, w, y):
    z = F.linear(h, W) / 0.7
    own = z.gather(-1, y[:, None]).squeeze(-1)
    return (torch.logsumexp(z - 100 * F.one_hot(y, V), -1) - own).mean()


def raised_beside_the_pick(h, W, w, y):
    z = F.linear(h, W)
    return ((z + w).logsumexp(-1) - z.gather(-1, y[:, None]).squeeze(-1)).sum()


def cooled_at_the_label(h, W, w, y):
    z = h @ W.t()
    return (2 * z.logsumexp(-1) - (z / 0.7)[torch.arange(N), y]).square().mean()


def decoupled(h, W, w, y):
    z = h @ W.t() / 0.5
    negatives = z.masked_fill(torch.eye(N, V, dtype=torch.bool), -math.inf)
    return (torch.logsumexp(negatives, 1) - z[range(N), range(N)]).mean()


def diagonal_apart(h, W, w, y):
    z = h @ W[:N].t()
    return (z - 100 * torch.eye(N)).logsumexp(-1).mean() - z.diagonal().sigmoid().mean()


def positive_in_front(h, W, w, y):
    z = F.linear(h, W) / 0.7
    own = z.gather(-1, y[:, None])
    negatives = z.masked_fill(F.one_hot(y, V).bool(), -math.inf)
    return (torch.cat([own, negatives], -1).logsumexp(-1) - own.squeeze(-1)).mean()


def columns_apart(h, W, w, y):
    z = F.linear(h, W)
    with torch.no_grad():
        weights = z.select(-1, 3).sigmoid()
    return (weights * (z + w).logsumexp(-1)).mean() - (w[0] * z[:, 0] + z[:, -1]).square().mean()


@pytest.mark.parametrize(
    ("f", "strategy"),
    in_turns(
        [
            *(lowered_at_the_label, raised_beside_the_pick, cooled_at_the_label),
            *(decoupled, diagonal_apart, columns_apart),
        ],
        ["token_chunks", "vocab_slabs", "materialise"],
    ),
)
def test_picked_from_the_same_product(f, strategy):
    """What is picked and the normaliser are two sites of one head."""
    check_head(f, strategy, 2)


def test_a_positive_in_front_of_its_negatives():
    """It is picked from the product that the negatives are; one sweep more has the column by itself."""
    compiled, graphs = compile_without_codegen(positive_in_front, memory_budget=0.5)
    args = inputs()
    check_numbers(gallery.run(compiled, args), positive_in_front, args)
    assert misses() == 0
    assert graphs.pieces > 1


def coarse_from_fine(h, W, w, y):
    """The sums of groups of probabilities are left; the loss of the classes themselves is not."""
    z = F.linear(h, W)
    groups = z.softmax(-1).view(N, V // 5, 5).sum(-1)
    return F.cross_entropy(z, y) + F.nll_loss((groups + 1e-8).log(), y // 5)


def test_a_loss_over_groups_of_classes_leaves_the_other_one():
    compiled, graphs = compile_rewritten(coarse_from_fine)
    args = inputs()
    check_numbers(gallery.run(compiled, args), coarse_from_fine, args)
    assert [site.form for site in graphs.report.sites] == ["mean[y != -100](lse - pick(y))"]


# Left


def read_elsewhere(h, W, w, y):
    z = F.linear(h, W)
    return z.logsumexp(-1).mean() + z.sigmoid().mean()


def picked_of_given_logits(h, W, w, y):
    return ((2 * h).logsumexp(-1) - h.gather(-1, y[:, None] % D).squeeze(-1)).mean() + W.sum()


def beside_the_diagonal(h, W, w, y):
    z = h @ W[:N].t()
    return ((z - 100 * torch.eye(N)).logsumexp(-1)[1:] - torch.diag(z, 1)).mean()


def diagonal_of_given_logits(h, W, w, y):
    return ((h - 100 * torch.eye(N, D)).logsumexp(-1)[:D] - torch.diag(h)).mean() + W.sum()


def picked_and_read(h, W, w, y):
    z = F.linear(h, W)
    picked = z.gather(-1, y[:, None]).squeeze(-1)
    return ((z + w).logsumexp(-1) - picked).mean() + z.tanh().sum(-1).mean()


def returned(h, W, w, y):
    z = F.linear(h, W)
    return z.logsumexp(-1).mean(), z.view(2, -1, V)


def picked_and_returned(h, W, w, y):
    z = F.linear(h, W)
    picked = (z / 0.7).gather(-1, y[:, None]).squeeze(-1)
    return F.cross_entropy(z, y) - picked.mean(), z


def test_what_is_in_memory_is_picked_as_it_is_written():
    compiled, graphs = compile_rewritten(picked_and_returned)
    args = inputs()
    check_numbers(gallery.run(compiled, args), picked_and_returned, args)
    assert [site.form for site in graphs.report.sites] == ["mean[y != -100](lse - pick(y))"]


LEFT = {
    read_elsewhere: Reason.NORMALISER,
    picked_of_given_logits: Reason.NOT_UNDERSTOOD,
    beside_the_diagonal: Reason.NOT_UNDERSTOOD,
    diagonal_of_given_logits: Reason.NOT_UNDERSTOOD,
    picked_and_read: Reason.NOT_UNDERSTOOD,
    returned: Reason.NORMALISER,
}


@pytest.mark.parametrize("f", LEFT, ids=lambda f: f.__name__)
def test_left(f):
    """All logits are in memory anyway."""
    compiled, graphs = compile_rewritten(f)
    args = inputs()
    check_numbers(gallery.run(compiled, args), f, args)
    assert sites() == 0
    assert graphs.count(ops.ROW_STATS) == 0
    assert {miss.reason for miss in graphs.report.misses} == {LEFT[f]}


def test_an_outer_sum_is_left():
    """As a forward algorithm has it: plain Inductor never has it in memory."""

    def f(alpha, transitions):
        return (alpha[:, None, :] + transitions[None]).logsumexp(-1).mean()

    compiled, graphs = compile_rewritten(f)
    args = torch.randn(N, V, requires_grad=True), torch.randn(V, V, requires_grad=True)
    check_numbers(gallery.run(compiled, args), f, args)
    assert graphs.count(ops.ROW_STATS) == 0


def test_weights_of_which_a_gradient_is_wanted():
    """It is not lost."""

    def f(h, W, w, y):
        return (w * F.linear(h, W).exp()).sum(-1).log().mean()

    compiled, graphs = compile_rewritten(f)
    h, W, w, y = inputs()
    args = h, W, w.requires_grad_(), y
    check_numbers(gallery.run(compiled, args), f, args)
    assert graphs.count(ops.ROW_STATS) == 0


# What is not finite, and what overflows


def infinities() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    z = torch.randn(N, V)
    z[0], z[1, 3], z[2, 5], z[3] = -math.inf, math.inf, math.nan, -200.0
    z[4, 1:], z[5, 7] = -math.inf, -math.inf
    return z.requires_grad_(), torch.rand(V) + 0.1


@pytest.mark.parametrize(
    "f",
    [
        lambda z, w: z.logsumexp(-1),
        lambda z, w: -z.logsumexp(-1, keepdim=True),
        lambda z, w: torch.log(2 + z.exp().sum(-1)),
    ],
    ids=["logsumexp", "kept", "log of sum"],
)
def test_what_is_not_finite(f: Callable[..., Any]):
    """As eager has it: rows that are -inf, that hold +inf or NaN."""
    ours, eager = _as_eager(f)
    torch.testing.assert_close(ours.gradients[0], eager.gradients[0], equal_nan=True)


@pytest.mark.parametrize(
    "f",
    [lambda z, w: z.exp().sum(-1), lambda z, w: (w * z.clamp(max=100).exp()).sum(-1)],
    ids=["sum", "weighed"],
)
def test_sums_that_are_not_finite(f: Callable[..., Any]):
    """Likewise; of a row that holds +inf or NaN no gradient is finite, where eager has some."""
    ours, eager = _as_eager(f)
    rows = torch.ones(N, dtype=torch.bool)
    rows[1:3] = False
    torch.testing.assert_close(ours.gradients[0][rows], eager.gradients[0][rows])


def _as_eager(f: Callable[..., Any]) -> tuple[gallery.Run, gallery.Run]:
    compiled, _ = compile_rewritten(f)
    ours, eager = gallery.run(compiled, infinities()), gallery.run(f, infinities())
    assert sites() == 1
    torch.testing.assert_close(ours.results, eager.results, equal_nan=True)
    return ours, eager


def test_a_sum_that_overflows_is_infinite_and_one_that_need_not_is_not():
    def f(z):
        return z.exp().sum(-1), z.exp().sum(-1).log()

    z = torch.tensor([[88.0] * 4 + [0.0] * 4, [95.0] * 8]).requires_grad_()
    compiled, _ = compile_rewritten(f)
    sums, logarithms = compiled(z)
    assert sums.tolist() == [math.inf, math.inf]
    torch.testing.assert_close(logarithms, z.logsumexp(-1))


def test_sums_keep_their_digits():
    """exp(max) d has the rounding of a product, where exp(max + log d) has that of an exponent of 80."""

    def f(z):
        return z.exp().sum(-1)

    z = (80 + torch.rand(N, V)).requires_grad_()
    compiled, _ = compile_rewritten(f)
    check_numbers(gallery.run(compiled, (z,)), f, (z,))
    assert sites() == 1


# Beside a loss


def squares_beside(scale):
    """A cross entropy, of logits over a temperature where that is not 1, beside the z-loss of the logits."""

    def f(h, W, w, y):
        z = F.linear(h, W)
        scaled = z if scale == 1 else z * scale
        return F.cross_entropy(scaled, y) + 0.1 * torch.logsumexp(z, -1).square().mean()

    return f


def of_all_rows(h, W, w, y):
    z = F.linear(h, W)
    return F.cross_entropy(z[:-1], y[1:]) + 0.1 * torch.logsumexp(z, -1).mean()


def of_scaled(h, W, w, y):
    z = F.linear(h, W)
    return F.cross_entropy(z, y) - 0.1 * torch.logsumexp(z.float() / 2.0, -1).mean()


BESIDE = {
    "unscaled": (squares_beside(1), 1),
    "loss scaled": (squares_beside(0.7), 2),
    "normaliser scaled": (of_scaled, 2),
    "of other rows": (of_all_rows, 1),
}


@pytest.mark.in_turns
@pytest.mark.parametrize("strategy", ["token_chunks", "vocab_slabs"])
@pytest.mark.parametrize("name", BESIDE)
def test_beside_a_loss(name, strategy):
    """A normaliser joins the loss of its logits; of others that one product makes, both are divided."""
    f, count = BESIDE[name]
    compiled, graphs = compile_without_codegen(f, strategy=strategy, memory_budget=0.5)
    args = inputs()
    check_numbers(gallery.run(compiled, args), f, args)
    assert (sites(), misses()) == (count, 0)
    assert counters["inductor_ce"][strategy] == count
    assert graphs.pieces > 1


def tokens(h, W, w, y):
    return F.cross_entropy(F.linear(h, W), y, reduction="none")


def over_all_tokens(h, W, w, y):
    return (2 * tokens(h, W, w, y)).logsumexp(0)


def over_sequences(h, W, w, y):
    return tokens(h, W, w, y).view(2, -1).logsumexp(-1).mean()


def over_glued_tokens(h, W, w, y):
    one, other = tokens(h[:8], W, w, y[:8]), tokens(h[8:], W, w, y[8:])
    return torch.cat([one[None], other[None]], 1).logsumexp(-1).mean()


def over_log_probabilities(h, W, w, y):
    z = h @ W.t()
    own = z.log_softmax(-1).gather(-1, y.view(-1, 1)).squeeze(-1) + 0.1 * z.logsumexp(-1)
    return -own.reshape(4, -1).logsumexp(-1).sum()


@pytest.mark.parametrize(
    "f",
    [over_all_tokens, over_sequences, over_glued_tokens, over_log_probabilities],
    ids=lambda f: f.__name__,
)
def test_a_normaliser_of_losses_is_no_site(f):
    """It is over rows, not over classes, and no miss either: the head of the losses is divided as ever."""
    compiled, graphs = compile_without_codegen(f, memory_budget=0.5)
    args = inputs()
    check_numbers(gallery.run(compiled, args), f, args)
    assert (sites(), misses()) == (1 + (f is over_glued_tokens), 0)
    assert graphs.pieces > 1


def weighed_blocks(x, w):
    """The maximum is along the first axis, and sums are weighed: as blocks of columns are combined."""
    scale = (x - x.amax(0).detach()).exp()
    return (w[: x.shape[0], None] * scale).sum(0)


def test_blocks_that_are_combined_are_no_loss():
    compiled, _ = compile_rewritten(weighed_blocks)
    args = torch.randn(2, N, requires_grad=True), torch.rand(V) + 0.1
    check_numbers(gallery.run(compiled, args), weighed_blocks, args)
    assert (sites(), misses()) == (0, 0)
