"""Sums and means over a range of the classes of log-probabilities: numbers, heads, what is left."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import Rewritten, compile_without_codegen, misses, sites
from pairwise import in_turns
from test_chosen_rows import check
from torch import Tensor

from inductor_ce import ops

B, S, D, V, PADDING = 3, 4, 8, 40, 6


def inputs() -> tuple[Tensor, ...]:
    h, W = torch.randn(B * S, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return h, W, torch.randint(V - PADDING, (B * S,))


def smoothed_but_the_first(h, W, y):
    logp = F.linear(h, W).log_softmax(-1)
    return (0.9 * F.nll_loss(logp, y, reduction="none") - 0.1 * logp[:, 1:].mean(1)).mean()


def smoothed_but_the_padding(h, W, y):
    logp = F.linear(h, W).float().log_softmax(-1)
    return F.nll_loss(logp, y) - 0.1 * logp[..., :-PADDING].mean()


def narrowed(h, W, y):
    logp = F.linear(h, W).log_softmax(-1)
    return logp.narrow(1, 4, 9).sum(-1, keepdim=True).square().mean() - logp[:, 3:-2].sum() / 100


def probability_of_a_range(h, W, y):
    return -F.linear(h, W).softmax(-1)[:, 5:].sum(1).log().mean()


def entropy_of_a_range(h, W, y):
    logp = F.linear(h, W).log_softmax(-1)
    return -(logp.exp() * logp)[:, 1:].sum(1).mean()


def along_the_middle(h, W, y):
    logp = F.linear(h, W).view(B, S, V).transpose(1, 2).log_softmax(1)
    return -logp[:, 2:-3].mean(1).square().mean()


def padding_of_minus_infinity(h, W, y):
    z = F.linear(h, W)
    z[:, -PADDING:] = -math.inf
    logp = z.log_softmax(-1)
    return F.nll_loss(logp, y) - 0.1 * logp[:, :-PADDING].mean(-1).mean()


def without_gradient(h, W, y):
    logp = F.linear(h, W).log_softmax(-1)
    with torch.no_grad():
        part = logp[:, :PADDING]
    weight = part.mean(1).exp()
    return (weight * F.nll_loss(logp, y, reduction="none")).mean()


FUSED = [
    *(smoothed_but_the_first, smoothed_but_the_padding, narrowed, probability_of_a_range),
    *(entropy_of_a_range, along_the_middle, padding_of_minus_infinity, without_gradient),
]


@pytest.mark.parametrize(("f", "strategy"), in_turns(FUSED, ["token_chunks", "vocab_slabs"]))
def test_numbers(f: Callable[..., Tensor], strategy: str):
    compiled, graphs = compile_without_codegen(f, strategy=strategy, memory_budget=0.7)
    check(f, compiled, inputs())
    assert sites() > 0
    assert misses() == 0
    assert graphs.pieces > 1


def rewritten(f: Callable[..., Tensor], *args: Tensor) -> Rewritten:
    backend = Rewritten()
    check(f, torch.compile(f, backend=backend), args)
    return backend


def test_ranges_that_are_alike_are_summed_once():
    def f(z, y):
        logp = z.log_softmax(-1)
        return logp[:, 1:].sum(1).square().mean() - logp[:, 1:].mean() - F.nll_loss(logp, y)

    z, y = torch.randn(V, V, requires_grad=True), torch.arange(V)  # as many rows as classes
    backend = rewritten(f, z, y)
    assert backend.count(ops.ROW_STATS) == 1
    assert backend.report.sites[0].which == "max,sumexp,pick,seendot:0"


def test_any_number_of_rows():
    compiled, _ = compile_without_codegen(smoothed_but_the_first)
    for n in (B * S, 7, 5):
        h, W, y = inputs()
        check(smoothed_but_the_first, compiled, (h[:n].detach().requires_grad_(), W, y[:n]))
    assert sites() == 2


def test_any_number_of_classes():
    def others(h, W, y):
        return torch.exp(F.linear(h, W)).scatter(1, y[:, None], 0.0).sum(1).log().mean()

    for f in (smoothed_but_the_padding, along_the_middle, others):
        torch._dynamo.reset()
        backend = Rewritten()
        check(f, torch.compile(f, backend=backend, dynamic=True), inputs())
        assert len(backend.report.sites) == 1


def test_a_range_is_kept():
    def f(z, y):
        some = z.log_softmax(-1)[:, 1:]
        return some.mean() + some.topk(2).values.sum()

    backend = rewritten(f, torch.randn(B * S, V, requires_grad=True), torch.randint(V, (B * S,)))
    assert "log_softmax of all classes" in backend.report.sites[0].kept


def test_verified():
    compiled, _ = compile_without_codegen(smoothed_but_the_padding, verify=True)
    check(smoothed_but_the_padding, compiled, inputs())
    assert sites() == 1


def test_infinities():
    """In the range, outside it, in all of it, and in a whole row."""

    def f(z):
        logp = z.log_softmax(-1)
        return logp[:, :-PADDING].sum(-1), logp[:, 0]

    z = torch.randn(5, V)
    z[0, 3], z[1, -1], z[2, :-PADDING], z[3], z[4, -2] = -math.inf, -math.inf, -math.inf, -math.inf, math.inf
    ours, expected = torch.compile(f, backend=Rewritten())(z), f(z)
    torch.testing.assert_close(ours, expected, equal_nan=True)


def edited(z, y):
    some = (z.log_softmax(-1) * 1.0)[:, 1:]
    some.mul_(2)
    return some.mean()


def edited_between(z, y):
    logp = z.log_softmax(-1) * 1.0
    some = logp[:, 1:]
    logp.zero_()
    return some.sum() + z.logsumexp(-1).sum()


def in_steps(z, y):
    return z.log_softmax(-1)[:, ::2].mean()


def of_some_rows_too(z, y):
    return z.log_softmax(-1)[1:, 1:].mean()


def of_the_rows(z, y):
    return z.log_softmax(-1)[:, 1:].sum(0).square().mean()


def of_tensors_beside(z, y):
    return (z.log_softmax(-1)[:, 1:] * y.new_ones(V - 1)).sum()


def normalised_anew(z, y):
    return z.log_softmax(-1)[:, 1:].log_softmax(-1).mean()


LEFT = [
    *(edited, edited_between, in_steps, of_some_rows_too, of_the_rows, of_tensors_beside),
    normalised_anew,
]


@pytest.mark.parametrize("f", LEFT, ids=lambda f: f.__name__)
def test_what_is_no_such_sum(f: Callable[..., Tensor]):
    backend = rewritten(f, torch.randn(B * S, V, requires_grad=True), torch.randint(V, (B * S,)))
    assert not [s for s in backend.report.sites if "k" in s.form]
