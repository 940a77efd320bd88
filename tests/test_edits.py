"""Edits in place of what has classes: functions where nobody else sees them, and left where somebody may.

Each program stands beside what it computes, written out without an edit, which float64 runs eagerly.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import Rewritten, compile_without_codegen
from pairwise import in_turns
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule

import inductor_ce
from inductor_ce import ops
from inductor_ce.graph.timeline import written_by
from inductor_ce.rewriting.edits import make_functional

B, S, V, D = 2, 6, 32, 8
PAD = 1


class Given(NamedTuple):
    a: Tensor
    b: Tensor
    y: Tensor

    def again(self, dtype: torch.dtype) -> "Given":
        a, b = (x.detach().to(dtype).requires_grad_() for x in (self.a, self.b))
        return Given(a, b, self.y)


def given() -> Given:
    y = torch.randint(2, V, (B, S))
    y[:, 4:] = PAD
    return Given(2 * torch.randn(B, S, V), 2 * torch.randn(B, S, V), y)


Program = Callable[[Tensor, Tensor, Tensor], Any]


def kl(a: Tensor, b: Tensor) -> Tensor:
    """Each entry of the divergence of the softmax of b from that of a, written out."""
    return b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))


def rows_of(y: Tensor) -> Tensor:
    return (y == PAD).unsqueeze(-1)


# Edits that become functions


def r_drop(a, b, y):
    pad_mask = y.unsqueeze(-1).eq(PAD)
    p_loss = F.kl_div(F.log_softmax(a, dim=-1), F.softmax(b, dim=-1), reduction="none")
    q_loss = F.kl_div(F.log_softmax(b, dim=-1), F.softmax(a, dim=-1), reduction="none")
    p_loss.masked_fill_(pad_mask, 0.0)
    q_loss.masked_fill_(pad_mask, 0.0)
    return (p_loss.sum() + q_loss.sum()) / 2


def r_drop_with_two_masks(a, b, y):
    p_loss = F.kl_div(F.log_softmax(a, dim=-1), F.softmax(b, dim=-1), reduction="none")
    p_loss.masked_fill_((y == PAD).unsqueeze(-1), 0.0)
    q_loss = F.kl_div(F.log_softmax(b, dim=-1), F.softmax(a, dim=-1), reduction="none")
    q_loss.masked_fill_(y.eq(PAD)[:, :, None], 0.0)
    return (p_loss.sum() + q_loss.sum()) / 2


def r_drop_indexed(a, b, y):
    p_loss, q_loss = kl(a, b), kl(b, a)
    p_loss[y == PAD] = 0
    q_loss[y == PAD] = 0.0
    return (p_loss.sum() + q_loss.sum()) / 2


def r_drop_written_out(a, b, y):
    both = kl(a, b) + kl(b, a)
    return both.masked_fill(rows_of(y), 0).sum() / 2


def each_kind(a, b, y):
    x = F.softmax(a, -1) * 1.0
    x.add_(0.5)
    x *= 2
    x.sub_(0.25).clamp_(min=0.3).sqrt_()
    x.masked_fill_(rows_of(y), 1.0)
    return x.log_().sum(-1)


def each_kind_written_out(a, b, y):
    x = ((F.softmax(a, -1) + 0.5) * 2 - 0.25).clamp(min=0.3).sqrt()
    return x.masked_fill(rows_of(y), 1.0).log().sum(-1)


def read_between(a, b, y):
    x = kl(a, b)
    first = x.sum(-1)
    x.mul_(3)
    return first + x.square().sum(-1)


def read_between_written_out(a, b, y):
    return kl(a, b).sum(-1) + (3 * kl(a, b)).square().sum(-1)


def seen_otherwise_afterwards(a, b, y):
    x = kl(a, b)
    x.mul_(3)
    flat = x.view(-1, V)
    flat.div_(2)
    return flat.sum(-1)


def seen_otherwise_written_out(a, b, y):
    return (1.5 * kl(a, b)).view(-1, V).sum(-1)


def by_itself(a, b, y):
    x = a.softmax(-1) + 0.1
    x.mul_(x)
    x.div_(V)
    return x.sqrt().sum(-1)


def by_itself_written_out(a, b, y):
    return ((a.softmax(-1) + 0.1).square() / V).sqrt().sum(-1)


def filled(a, b, y):
    target = b.detach().softmax(-1) * 1.0
    target.fill_(0.1 / (V - 1))
    target.scatter_(-1, y.unsqueeze(-1), 0.9)
    return -(target * a.log_softmax(-1)).sum(-1)


def filled_written_out(a, b, y):
    return F.cross_entropy(a.view(-1, V), y.view(-1), reduction="none").view(B, S) * (0.9 - 0.1 / (V - 1)) - (
        a.log_softmax(-1) * 0.1 / (V - 1)
    ).sum(-1)


def without_any_gradient(a, b, y):
    with torch.no_grad():
        target = b.softmax(-1) * 1.0
        target.mul_(0.5)
    return -(target * a.log_softmax(-1)).sum(-1)


def without_any_gradient_written_out(a, b, y):
    return -(b.detach().softmax(-1) * 0.5 * a.log_softmax(-1)).sum(-1)


def gradient_that_an_edit_brings(a, b, y):
    x = torch.zeros_like(a)
    x.add_(a.log_softmax(-1))
    return F.nll_loss(x.view(-1, V), y.view(-1))


def gradient_brought_written_out(a, b, y):
    return F.cross_entropy(a.view(-1, V), y.view(-1))


def label_scattered(a, b, y):
    p = a.softmax(-1) * 1.0
    p.scatter_(-1, y.unsqueeze(-1), 0.0)
    return p.sum(-1)


def label_scattered_written_out(a, b, y):
    return (a.softmax(-1) * (1 - F.one_hot(y, V))).sum(-1)


def relu_in_place(a, b, y):
    return F.relu(a.softmax(-1) - 0.05, inplace=True).sum(-1)


def relu_written_out(a, b, y):
    return (a.softmax(-1) - 0.05).clamp(min=0).sum(-1)


def far(a):
    """Logits, every third of which is so low that its probability is 0."""
    return torch.where(torch.arange(V) % 3 == 0, a - 800, a)


def infinity_capped(a, b, y):
    """As torch's divergence of two categoricals, whose infinity is a number."""
    log_q, log_p = F.log_softmax(far(a), -1), F.log_softmax(b, -1)
    terms = log_p.exp() * (log_p - log_q)
    terms[torch.eq(log_q.exp(), 0)] = 50.0
    terms[log_p.exp() == 0] = 0
    return terms.sum(-1)


def infinity_capped_written_out(a, b, y):
    return torch.where(torch.arange(V) % 3 == 0, 50.0, kl(far(a), b)).sum(-1)


FUNCTIONS: list[tuple[Program, Program]] = [
    *((r_drop, r_drop_written_out), (r_drop_with_two_masks, r_drop_written_out)),
    *((r_drop_indexed, r_drop_written_out), (each_kind, each_kind_written_out)),
    *((read_between, read_between_written_out), (seen_otherwise_afterwards, seen_otherwise_written_out)),
    *((by_itself, by_itself_written_out), (without_any_gradient, without_any_gradient_written_out)),
    *((gradient_that_an_edit_brings, gradient_brought_written_out), (filled, filled_written_out)),
    *((label_scattered, label_scattered_written_out), (relu_in_place, relu_written_out)),
    (infinity_capped, infinity_capped_written_out),
]


# Edits that stay


def seen_by_a_view(a, b, y):
    x = kl(a, b)
    flat = x.view(-1)
    x.mul_(3)
    return x.sum() + flat.square().sum()


def seen_by_a_view_written_out(a, b, y):
    return (3 * kl(a, b)).sum() + (3 * kl(a, b)).square().sum()


def by_a_view(a, b, y):
    x = kl(a, b)
    x[:, 0].mul_(3)
    return x.sum()


def by_a_view_written_out(a, b, y):
    scale = torch.ones(S, 1, dtype=a.dtype)
    scale[0] = 3
    return (kl(a, b) * scale).sum()


def by_a_half(a, b, y):
    x = kl(a, b).detach()
    first, second = x.chunk(2)
    x.mul_(3)
    return (torch.cat([first, 2 * second]) * a.log_softmax(-1)).sum()


def by_a_half_written_out(a, b, y):
    scale = torch.tensor([3.0, 6.0], dtype=a.dtype).view(2, 1, 1)
    return (kl(a, b).detach() * scale * a.log_softmax(-1)).sum()


def seen_detached(a, b, y):
    x = kl(a, b)
    constant = x.detach()
    x.mul_(3)
    return (x * constant).sum()


def seen_detached_written_out(a, b, y):
    return (3 * kl(a, b) * (3 * kl(a, b)).detach()).sum()


def under_no_grad(a, b, y):
    """Twice as large, and the gradient is not."""
    x = kl(a, b)
    with torch.no_grad():
        x.mul_(2)
    return x.sum()


def under_no_grad_written_out(a, b, y):
    x = kl(a, b)
    return (x + x.detach()).sum()


def of_the_data(a, b, y):
    x = kl(a, b)
    x.data.mul_(2)
    return x.sum()


def under_no_grad_by_its_name(a, b, y):
    """What is left has the name of the edit, and the gradient of the tensor."""
    x = a * 1.0
    with torch.no_grad():
        x *= 0.5
    return F.cross_entropy(x.view(-1, V), y.view(-1))


def under_no_grad_by_its_name_written_out(a, b, y):
    return F.cross_entropy((a - 0.5 * a.detach()).view(-1, V), y.view(-1))


def under_no_grad_of_a_linear_layer(a, b, y):
    x = a @ torch.eye(V, dtype=a.dtype)
    with torch.no_grad():
        x *= 0.5
    return F.cross_entropy(x.view(-1, V), y.view(-1))


def detached_and_scaled(a, b, y):
    """As a temperature is learnt: the logits have no gradient, and what they are divided by has one."""
    x = (a @ torch.eye(V, dtype=a.dtype)).detach()
    x /= 1 + b.exp().mean(-1, keepdim=True)
    return F.cross_entropy(x.view(-1, V), y.view(-1))


def detached_and_scaled_written_out(a, b, y):
    return F.cross_entropy((a.detach() / (1 + b.exp().mean(-1, keepdim=True))).view(-1, V), y.view(-1))


def filled_again(a, b, y):
    x = b.softmax(-1) * 1.0
    entropy = -(x * x.detach().log()).sum(-1)
    x.fill_(0.5)
    return entropy.detach() - (x * a.log_softmax(-1)).sum(-1)


def filled_again_written_out(a, b, y):
    p = b.detach().softmax(-1)
    return -(p * p.log()).sum(-1) - 0.5 * a.log_softmax(-1).sum(-1)


def weights_edited_later(a, b, y):
    """A loss that no gradient is wanted of, whose weights become others, beside one that has a gradient."""
    x = F.one_hot(y, V).to(a.dtype)
    x.copy_(2 * x)
    with torch.no_grad():
        nll = -(x * b.log_softmax(-1)).sum(-1)
    x *= a
    return nll - (b.softmax(-1) * b.log_softmax(-1)).sum(-1) + x.sum(-1)


def weights_edited_later_written_out(a, b, y):
    weight = 2 * F.one_hot(y, V)
    nll = -(weight * b.detach().log_softmax(-1)).sum(-1)
    return nll - (b.softmax(-1) * b.log_softmax(-1)).sum(-1) + (weight * a).sum(-1)


def one_edit_of_two(a, b, y):
    x = kl(a, b)
    x.mul_(3)
    with torch.no_grad():
        x.add_(1)
    return x.sum()


def one_edit_of_two_written_out(a, b, y):
    return (3 * kl(a, b)).sum() + a.numel()


def copied_into(a, b, y):
    x = kl(a, b)
    x.copy_(kl(b, a))
    return x.sum()


def copied_into_written_out(a, b, y):
    return kl(b, a).sum()


STAY: list[tuple[Program, Program]] = [
    *((seen_by_a_view, seen_by_a_view_written_out), (by_a_view, by_a_view_written_out)),
    *((by_a_half, by_a_half_written_out), (seen_detached, seen_detached_written_out)),
    *((under_no_grad, under_no_grad_written_out), (of_the_data, under_no_grad_written_out)),
    *((one_edit_of_two, one_edit_of_two_written_out), (copied_into, copied_into_written_out)),
    (under_no_grad_by_its_name, under_no_grad_by_its_name_written_out),
    (under_no_grad_of_a_linear_layer, under_no_grad_by_its_name_written_out),
    (detached_and_scaled, detached_and_scaled_written_out),
    *((filled_again, filled_again_written_out), (weights_edited_later, weights_edited_later_written_out)),
]


def outcome(f: Program, args: Given) -> list[Tensor]:
    """The value, and the gradients of its squares where upstream gradients are several."""
    value = f(*args)
    gradients = torch.autograd.grad(value.square().sum(), args[:2], materialize_grads=True)
    return [value.detach(), *gradients]


def check(f: Program, written_out: Program, dtype: torch.dtype) -> Rewritten:
    args, backend = given().again(dtype), Rewritten()
    actual = outcome(torch.compile(f, backend=backend, fullgraph=True), args)
    expected = outcome(written_out, args.again(torch.float64))
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close([x.double() for x in actual], expected, **tolerance)
    return backend


def edits_of(backend: Rewritten) -> int:
    return sum(any(written_by(node)) for gm in backend.final for node in gm.graph.nodes)


@pytest.mark.parametrize(("of", "dtype"), in_turns(FUNCTIONS, [torch.float64, torch.float32]))
def test_edits_that_nobody_else_sees_are_functions(of: tuple[Program, Program], dtype: torch.dtype):
    backend = check(*of, dtype)
    assert not edits_of(backend)
    assert backend.report.sites
    assert not backend.report.misses


@pytest.mark.parametrize(("of", "dtype"), in_turns(STAY, [torch.float64, torch.float32]))
def test_edits_that_others_may_see_stay(of: tuple[Program, Program], dtype: torch.dtype):
    assert edits_of(check(*of, dtype))


def test_what_is_filled_keeps_a_gradient_of_0():
    """It is returned, and its gradient is 0 and not missing."""

    def f(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        x = b.softmax(-1) * 1.0
        x.fill_(0.5)
        return -(x * a.log_softmax(-1)).sum(-1), x

    a, b, _ = given().again(torch.float64)
    _, x = torch.compile(f, backend=Rewritten(), fullgraph=True)(a, b)
    assert x.requires_grad
    (gradient,) = torch.autograd.grad(x.sum(), b)
    assert not gradient.any()


def test_masks_that_are_made_twice_are_one():
    """Both ways of the divergence are summed by one operator, over rows of one mask."""
    for f in (r_drop, r_drop_with_two_masks, r_drop_indexed):
        backend = check(f, r_drop_written_out, torch.float64)
        assert backend.count(ops.DIVERGENCE) == 1
        (form,) = {site.form for site in backend.report.sites}
        assert form.count("sum") == 2, form  # over rows, and over classes


def filled_copy(how: str) -> Program:
    def f(a: Tensor, b: Tensor, y: Tensor) -> Any:
        log_p = a.view(-1, V).log_softmax(-1)
        q = log_p.data.clone()
        seen = q.exp() if how == "read before" else 0.0
        q.zero_() if how == "zeros" else q.fill_(0.1 / V)
        q.scatter_(1, y.view(-1, 1), 0.9)
        q[:, PAD] = 0  # has no function
        return (
            F.kl_div(log_p, q, reduction="sum")
            + (b * seen.view(b.shape) if how == "read before" else b).sum()
        )

    return f


def filled_copy_written_out(how: str) -> Program:
    def f(a: Tensor, b: Tensor, y: Tensor) -> Any:
        log_p = a.view(-1, V).log_softmax(-1)
        q = torch.full_like(log_p, 0.0 if how == "zeros" else 0.1 / V).scatter(1, y.view(-1, 1), 0.9)
        q = torch.where(torch.arange(V) == PAD, 0.0, q)
        seen = log_p.detach().exp().view(b.shape) if how == "read before" else 1.0
        return (torch.xlogy(q, q) - q * log_p).sum() + (b * seen).sum()

    return f


@pytest.mark.parametrize("how", ["fill", "zeros", "read before"])
def test_a_copy_that_is_filled_needs_nothing_of_what_is_copied(how: str):
    backend = check(filled_copy(how), filled_copy_written_out(how), torch.float64)
    (site,) = backend.report.sites
    assert bool(site.kept) == (how == "read before")
    copies = [n for gm in backend.final for n in gm.graph.nodes if n.target == "clone"]
    assert len(copies) == (how == "read before")


def test_a_copy_with_a_gradient_that_is_filled_gives_one_of_zeros():
    def f(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        q = (b * 1.0).clone()
        q.fill_(1 / V)
        q[0] = 0  # has no function
        return -(q * a.log_softmax(-1)).sum()

    def written_out(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return -a[1].log_softmax(-1).sum() / V

    args, backend = given().again(torch.float32), Rewritten()
    torch.compile(f, backend=backend, fullgraph=True)(*args).backward()
    assert args.b.grad is not None
    check(f, written_out, torch.float64)


def test_of_log_probabilities_whose_shape_is_read_nothing_is_told():
    def f(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
        log_p = F.linear(h, W).log_softmax(-1)
        q = torch.zeros_like(log_p).scatter_(1, y[:, None], 0.9)
        q[:, PAD] = 0
        return F.kl_div(log_p, q, reduction="sum")

    def read(h: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, W)
        return F.cross_entropy(z, y), z.sigmoid().cumsum(-1)

    h, W, y = torch.randn(12, D, requires_grad=True), torch.randn(V, D, requires_grad=True), torch.arange(12)
    with inductor_ce.install(min_vocab=2, memory_budget=0.5):
        heads = [inductor_ce.explain(each, h, W, y).sites[0].head for each in (f, read)]
    assert heads[0] == ""
    assert "also used by sigmoid" in heads[1]


def test_an_input_that_is_edited_is_edited():
    def f(a: Tensor, b: Tensor) -> Tensor:
        q = b.view(-1, V)
        q.exp_()
        q.div_(q.sum(-1, keepdim=True))
        return -(q * a.view(-1, V).log_softmax(-1)).sum(-1)

    a, b, _ = given()
    probabilities = b.clone()
    backend = Rewritten()
    actual = torch.compile(f, backend=backend, fullgraph=True)(a, probabilities)
    torch.testing.assert_close(probabilities, b.softmax(-1))
    torch.testing.assert_close(
        actual, F.cross_entropy(a.view(-1, V), b.view(-1, V).softmax(-1), reduction="none")
    )
    assert edits_of(backend) == 2


def test_pieces_that_are_taken_out_after_an_edit_stay_views():
    """Of pieces that were cut before it: Dynamo takes them out at once, a graph need not."""
    graph = Graph()
    a = graph.placeholder("a")
    p = graph.call_function(torch.softmax, (a, -1))
    halves = graph.call_method("chunk", (p, 2))
    edit = graph.call_method("mul_", (p, 3))
    graph.output((graph.call_function(operator.getitem, (halves, 0)), edit))
    gm = GraphModule(torch.nn.Module(), graph)
    with FakeTensorMode() as mode:
        make_examples_by(mode, gm)
    make_functional(graph, 2)
    gm.recompile()
    z = torch.randn(4, V)
    torch.testing.assert_close(gm(z)[0], 3 * z[:2].softmax(-1))


def make_examples_by(mode: FakeTensorMode, gm: GraphModule) -> None:
    """Give nodes the examples that Dynamo gives them."""

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            n.meta["example_value"] = super().run_node(n)
            return n.meta["example_value"]

    Recorder(gm).run(mode.from_tensor(torch.empty(4, V)))


def test_through_all_passes():
    """Of one linear layer and two passes: its head in pieces."""

    def f(h: Tensor, again: Tensor, W: Tensor, y: Tensor) -> Tensor:
        a, b = (F.linear(x, W) for x in (h, again))
        nll = F.cross_entropy(a.view(-1, V), y.view(-1), ignore_index=PAD)
        return nll + F.cross_entropy(b.view(-1, V), y.view(-1), ignore_index=PAD) + r_drop(a, b, y)

    def written_out(h: Tensor, again: Tensor, W: Tensor, y: Tensor) -> Tensor:
        a, b = h @ W.t(), again @ W.t()
        picked = [-x.log_softmax(-1).gather(-1, y[..., None])[y != PAD].mean() for x in (a, b)]
        return sum(picked) + r_drop_written_out(a, b, y)

    y = given().y
    of = [torch.randn(B, S, D), torch.randn(B, S, D), torch.randn(V, D)]
    args = [x.double().requires_grad_() for x in of]
    exact = torch.autograd.grad(written_out(*args, y), args)
    args = [x.requires_grad_() for x in of]
    compiled, graphs = compile_without_codegen(f, strategy="token_chunks", memory_budget=0.4)
    gradients = torch.autograd.grad(compiled(*args, y), args)
    torch.testing.assert_close([g.double() for g in gradients], [*exact], rtol=1e-4, atol=1e-5)
    assert graphs.pieces > 2
    assert not graphs.report.misses
