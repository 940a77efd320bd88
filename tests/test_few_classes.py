"""Losses over fewer classes than `min_vocab`: left as they are, and told of only to who asks."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from compose import FAMILIES, function, source
from harness import Rewritten, compile_without_codegen, misses, sites
from hypothesis import strategies as st
from meaning import make_inputs
from test_generated import drawn, run_cases
from torch import Tensor

import inductor_ce
from inductor_ce import Reason, ops

N, V, X, D = 12, 40, 6, 8  # X experts
MIN_VOCAB = 16


def inputs() -> tuple[Tensor, ...]:
    h, W, R = (torch.randn(*shape, requires_grad=True) for shape in ((N, D), (D, V), (D, X)))
    return h, W, R, torch.randint(V, (N,))


def experts(h, W, R, y):
    """Gates, the load of each expert, and both losses of a router, beside a cross entropy."""
    gates = h @ R
    lse = gates.logsumexp(-1)
    p = gates.softmax(-1)
    top, chosen = p.max(-1)
    load = F.one_hot(chosen, X).float().mean(0)
    entropy = -(p * gates.log_softmax(-1)).sum(-1).mean()
    router = 1e-2 * lse.square().mean() + X * (load * p.mean(0)).sum() - 1e-3 * entropy
    return F.cross_entropy((h * top[:, None]) @ W, y) + router + 0.1 * F.cross_entropy(gates, y % X)


def stepped(f, args):
    args = [a.detach().clone().requires_grad_(a.requires_grad) for a in args]
    value = f(*args)
    value.backward()
    return value.detach(), *(a.grad for a in args if a.requires_grad)


def test_a_model_with_experts_is_silent_and_right():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled, graphs = compile_without_codegen(experts, min_vocab=MIN_VOCAB, on_miss="raise")
        args = inputs()
        ours = stepped(compiled, args)
    assert (sites(), misses()) == (1, 0)
    assert graphs.count(ops.ROW_STATS) == 1
    exact = stepped(experts, [a.double() if a.is_floating_point() else a for a in args])
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-6)


def test_who_asks_is_told():
    inductor_ce.install(min_vocab=MIN_VOCAB)
    report = inductor_ce.explain(experts, *inputs())
    first, *_ = str(report).splitlines()
    assert first == "inductor_ce: 1 loss fused, 0 left as written, 1 of few classes (.small)"
    assert "SMALL_VOCAB" not in str(report)
    (miss,) = report.small
    assert miss.reason is Reason.SMALL_VOCAB
    assert f"The vocabulary of {X} is below min_vocab={MIN_VOCAB}." in miss.message
    assert report.to_dict()["small"][0]["reason"] == "SMALL_VOCAB"


def test_the_first_line_says_nothing_where_there_are_none():
    report = inductor_ce.explain(F.relu, torch.randn(3))
    assert str(report) == "inductor_ce: 0 losses fused, 0 left as written"


def weighed(z, y):
    target = F.one_hot(y, z.shape[1]).float()
    return F.cross_entropy(z, target, weight=z.detach().mean(0).requires_grad_() * 2)


def soft(z, y):
    return F.cross_entropy(z, (z * 2).softmax(-1))


def transformed(z, y):
    return torch.vmap(F.cross_entropy)(z[:, None], y[:, None]).mean()


def maximum_kept(z, y):
    shifted = z - z.amax(-1, keepdim=True)
    return (shifted.exp().sum(-1).log() - z.gather(-1, y[:, None]).squeeze(-1)).mean()


def edited(z, y):
    z = z * 1.0
    seen = z.view(-1)
    loss = F.cross_entropy(z, y)
    z.mul_(2)
    return loss + seen.sum()


OTHERS = [weighed, soft, transformed, maximum_kept, edited]


@pytest.mark.parametrize("f", OTHERS, ids=lambda f: f.__name__)
def test_no_other_reason_comes_first(f):
    """What would be told of a large vocabulary is not told of a small one."""
    z, y = torch.randn(N, X, requires_grad=True), torch.randint(X, (N,))
    for min_vocab, silent in ((2, False), (MIN_VOCAB, True)):
        torch._dynamo.reset()
        rewritten = Rewritten(min_vocab=min_vocab)
        torch.compile(f, backend=rewritten)(z, y)
        report = rewritten.report
        assert [bool(report.misses), bool(report.small)] == [not silent, silent], (min_vocab, report)
        assert {miss.reason for miss in report.small} <= {Reason.SMALL_VOCAB}


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_losses_over_few_classes_are_silent(family: str):
    def check(data: st.DataObject) -> None:
        spelling, number = drawn(data, family)
        rewritten = Rewritten(min_vocab=spelling.V + 1, on_miss="raise")
        torch._dynamo.reset()
        given, f = make_inputs(spelling, number), function(source(spelling))
        torch.compile(f, backend=rewritten)(given.logits.clone().requires_grad_(), *given.others)
        assert not rewritten.changed
        assert not rewritten.report.sites

    run_cases(check, 8, 200 + FAMILIES.index(family))
