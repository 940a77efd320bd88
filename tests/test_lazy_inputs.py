"""Lazy logits as inputs of compiled functions, which take them apart: in any state, of any length."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import compile_lazily, sites
from head_cases import counts
from lazy_cases import Case, Scaled
from lazy_programs import (
    B,
    D,
    Model,
    Program,
    V,
    banned_by_a_mask,
    banned_classes,
    batch,
    ce,
    edited,
    gradients,
    lazies,
    padded,
    padded_and_scaled,
    raw,
    total,
)
from pairwise import EVERYTHING, pairwise
from torch import Tensor, nn
from torch._dynamo.utils import counters

from inductor_ce.api import deferral
from inductor_ce.common.errors import LazyLogitsError


def assert_same_and_lazy(m: Model, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """The same loss and gradients, those by the logits too, which nobody had made before."""
    torch.testing.assert_close(ours[0], theirs[0])
    (z,) = lazies(ours)
    assert not z.is_made
    torch.testing.assert_close(*(gradients(m, r[0] + total(r[1:])) for r in (ours, theirs)))


def test_into_another_compiled_function() -> None:
    """After a graph break, or in a function of its own; the loss has its head there."""

    def f(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        loss, z = raw(m, x, y)
        torch._dynamo.graph_break()
        return loss + ce(z.float()[:, 1:], y[:, 1:]), z

    m, (x, y) = Model(), batch()
    compiled, _ = compile_lazily(f)
    for _ in range(2):
        assert_same_and_lazy(m, compiled(m, x, y), f(m, x, y))
    assert sites() == 2


@pytest.mark.parametrize("first", [edited, banned_classes, banned_by_a_mask, padded, padded_and_scaled])
def test_steps_of_classes_into_another_compiled_function(first: Program) -> None:
    """They are those of the classes, however the rows are arranged."""

    def f(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        loss, z = first(m, x, y)
        torch._dynamo.graph_break()
        classes = z.size(-1)
        return loss + F.cross_entropy(z[:, 1:].reshape(-1, classes), y[:, 1:].reshape(-1) % classes), z

    m, (x, y) = Model(), batch()
    compiled, graphs = compile_lazily(f)
    assert_same_and_lazy(m, compiled(m, x, y), f(m, x, y))
    assert sites() == 2
    assert graphs.pieces == 2


def hidden_read(h: Tensor, w: Tensor, z: Tensor, y: Tensor) -> Tensor:
    return ce(z, y) + h.pow(2).mean()


def hidden_read_first(h: Tensor, w: Tensor, z: Tensor, y: Tensor) -> Tensor:
    return h.pow(2).mean() + ce(z, y)


def hidden_edited(h: Tensor, w: Tensor, z: Tensor, y: Tensor) -> Tensor:
    loss = ce(z, y)
    return loss + h.mul_(2).pow(2).mean()


def hidden_edited_first(h: Tensor, w: Tensor, z: Tensor, y: Tensor) -> Tensor:
    h += 1
    return ce(z, y) + h.pow(2).mean()


def a_view_edited(h: Tensor, w: Tensor, z: Tensor, y: Tensor) -> Tensor:
    h[2:].mul_(3)
    return ce(z, y) + h.pow(2).mean()


def weight_read(h: Tensor, w: Tensor, z: Tensor, y: Tensor) -> Tensor:
    return ce(z, y) + w.pow(2).mean()


def both_read(h: Tensor, w: Tensor, z: Tensor, y: Tensor) -> Tensor:
    return ce(z, y) + (h @ w.t()).logsumexp(-1).mean() + h.mean() * w.mean()


EDITED = [hidden_edited, hidden_edited_first, a_view_edited]  # with a gradient of the weight eager refuses
READ = [hidden_read, hidden_read_first, weight_read, both_read]


@pytest.mark.parametrize(
    ("rest", "frozen"), [*itertools.product(READ, [False, True]), *((edited, True) for edited in EDITED)]
)
def test_what_lazy_logits_are_made_of_is_read_too(rest: Callable[..., Tensor], frozen: bool) -> None:
    """Behind a graph break: Dynamo takes it from the logits, of which it is a part."""

    def f(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        h = x.sin()
        z = F.linear(h, w)
        torch._dynamo.graph_break()
        return rest(h, w, z, y)

    w, x, y = torch.randn(V, D, requires_grad=not frozen), torch.randn(12, D), torch.randint(V, (12,))
    compiled, _ = compile_lazily(f)
    for _ in range(2):
        leaves = [x.clone().requires_grad_(), *([] if frozen else [w])]
        ours, theirs = (g(leaves[0], w, y) for g in (compiled, f))
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(r, leaves) for r in (ours, theirs)))
    assert sites() == (2 if rest is both_read else 1)


def divergence(z: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(z, -1), F.log_softmax(q, -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1).mean()


def test_a_loss_knows_of_which_a_gradient_is_wanted() -> None:
    """As where it is compiled with what makes them: of both, of one."""

    def f(m: Model, other: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        (a, z), (b, q) = raw(m, x, y), raw(other, x, y)
        torch._dynamo.graph_break()
        return a + b + divergence(z, q), z, q

    (m, other), (x, y) = (Model(), Model()), batch()
    compiled, _ = compile_lazily(f)
    for wanted in (True, False):
        other.requires_grad_(wanted)
        torch._dynamo.reset()
        counters.clear()
        ours, theirs = compiled(m, other, x, y), f(m, other, x, y)
        torch.testing.assert_close(ours[0], theirs[0])
        assert len(lazies(ours)) == 2
        learning = nn.ModuleList([m, other] if wanted else [m])
        torch.testing.assert_close(*(gradients(learning, r[0]) for r in (ours, theirs)))
        assert sites() == 3


def edit(z: Tensor) -> Tensor:
    z.mul_(2)
    return z


def hook(z: Tensor) -> Tensor:
    z.register_hook(lambda gradient: gradient * 3)
    return z


def write(z: Tensor) -> Tensor:
    z.data.zero_()
    return z


def view_of_what_is_edited(z: Tensor) -> Tensor:
    view = z.view(z.shape)
    z.sum()
    z[0].detach().zero_()
    return view


STATES: list[Callable[[Tensor], Tensor]] = [
    *(edit, hook, write, view_of_what_is_edited, Scaled.apply, Tensor.float, Tensor.detach),
    *(lambda z: z[:, :-1], lambda z: [z, z.sum()][0]),
]


def shifted_of_rows(z: Tensor, y: Tensor) -> Tensor:
    return ce(z.float()[..., :-1, :].contiguous(), y[..., 1:])


def with_metrics(z: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        right = (z.argmax(-1) == y).float().mean() + z.logsumexp(-1).mean() + z.max(-1).values.mean()
        picked = z.log_softmax(-1).gather(-1, y.clamp_min(0)[..., None]).mean()
    return ce(z.view(-1, z.shape[-1]), y) * right + picked


def flattened(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten()) + F.cross_entropy(z.unsqueeze(0)[0].mT, y)


LOSSES_OF_AN_INPUT = pairwise(
    [ce, shifted_of_rows, with_metrics, flattened],
    [True, None],
    valid=lambda loss, dynamic: EVERYTHING or dynamic or loss is ce,
)


def test_an_input_of_any_length() -> None:
    """The third length is not compiled for again, nor with `dynamic` the second."""
    m = Model()
    of = m.head.weight, m.embed.weight
    first, _ = compile_lazily(raw, dynamic=True)
    seconds = [(loss, *compile_lazily(loss, dynamic=dynamic), []) for loss, dynamic in LOSSES_OF_AN_INPUT]
    for length in (6, 9, 4):
        x, y = batch(length)
        for loss, second, graphs, compiled in seconds:
            told, z = first(m, x, y)
            ours, theirs = second(z, y), loss(m.head(m.hidden(x)), y)
            torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(*(torch.autograd.grad(r, of) for r in (ours + 0 * told, theirs)))
            compiled.append(len(graphs.final))
    for (*_, (at_first, at_second, at_third)), (_, dynamic) in zip(seconds, LOSSES_OF_AN_INPUT, strict=True):
        assert at_third == at_second
        assert at_second == at_first or not dynamic


def test_marked_sizes_stay_dynamic_behind_a_break() -> None:
    """As those of logits that are returned as they are: nothing is compiled again for another length."""

    def f(m: Model, x: Tensor, y: Tensor) -> Tensor:
        z = m.head(m.hidden(x))
        torch._dynamo.graph_break()
        return F.cross_entropy(z.transpose(1, 2), y)

    m = Model()
    compiled, graphs = compile_lazily(f)
    for length in (7, 11, 5):
        x, y = batch(length)
        for each in (x, y):
            torch._dynamo.mark_dynamic(each, 1)
        ours, theirs = compiled(m, x, y), f(m, x, y)
        torch.testing.assert_close(ours, theirs)
        of = m.head.weight, m.embed.weight
        torch.testing.assert_close(*(torch.autograd.grad(r, of) for r in (ours, theirs)))
    assert (sites(), len(graphs.final)) == (1, 4)


def test_marked_sizes_stay_dynamic_where_results_are_copied() -> None:
    """As those of CUDA graphs are."""
    case, mark = Case(), "_dynamo_propagated_dynamic_indices"
    hidden, weight = case.parts
    setattr(hidden, mark, {0, 2})
    lazy = deferral._Lazy(0, case.z.source.recipe, None, ((True, 0), (False, 0)), False)
    for copies in (True, False):
        (z,) = deferral._finished(1, (lazy,), copies, [weight], [hidden])
        assert (getattr(z, mark), getattr(z.source.parts[0], mark)) == ({0}, {0, 2})
        assert (z.source.parts[0] is hidden) != copies
        torch.testing.assert_close(z, case.eager)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_learnt_weight_that_is_no_parameter(dynamic: bool | None) -> None:
    """Under dynamic=True its sizes are symbols."""

    def f(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = torch.tanh(h) @ w.t()
        torch._dynamo.graph_break()
        return ce(z[:, :-1], y[:, 1:])

    w = torch.randn(V, D, requires_grad=True)
    compiled, _ = compile_lazily(f, dynamic=dynamic, strategy="token_chunks", memory_budget=0.7)
    for length in (5, 9, 12):
        h, y = torch.randn(B, length, D, requires_grad=True), torch.randint(V, (B, length))
        ours, theirs = compiled(h, w, y), ce((torch.tanh(h) @ w.t())[:, :-1], y[:, 1:])
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(r, [h, w]) for r in (ours, theirs)))
    assert counts() == {"token_chunks": 1 if dynamic else 2}


@pytest.mark.parametrize("views", [lambda z: z[:, -1], lambda z: z.view(-1, V), lambda z: z[:, 1:]])
def test_views_that_are_returned_behind_a_break(views: Callable[[Tensor], Tensor]) -> None:
    """Under dynamic=True the hidden size is a symbol there, until it is taken for a number."""

    def f(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = m.head(m.hidden(x))
        torch._dynamo.graph_break()
        return ce(z, y), views(z)

    m = Model()
    compiled, _ = compile_lazily(f, dynamic=True, strategy="token_chunks", memory_budget=0.7)
    for length in (7, 12, 5):
        x, y = batch(length)
        ours, theirs = compiled(m, x, y), f(m, x, y)
        assert len(lazies(ours)) == 1
        torch.testing.assert_close(ours, theirs)
        of = m.head.weight, m.embed.weight
        torch.testing.assert_close(*(torch.autograd.grad(r[0] + total(r[1:]), of) for r in (ours, theirs)))
    assert counts() == {"token_chunks": 1}


def test_a_weight_whose_sizes_may_change_is_left_as_it_is() -> None:
    """That is not learnt: where its classes are symbolic, nothing is compiled again for another number."""

    def f(h: Tensor, w: Tensor) -> Tensor:
        z = torch.tanh(h) @ w.t()
        torch._dynamo.graph_break()
        return z.sigmoid().mean()

    compiled, graphs = compile_lazily(f, dynamic=True)
    for classes in (70, 81, 93):
        h, w = torch.randn(B, D, requires_grad=True), torch.randn(classes, D)
        ours, theirs = compiled(h, w), f(h, w)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(r, h)[0] for r in (ours, theirs)))
    assert len(graphs.final) == 4


def test_states_of_an_input() -> None:
    """One compiled function is given lazy logits to which different things have been done."""

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z.float().flatten(0, 1), torch.arange(z.shape[0] * z.shape[1]))

    compiled, _ = compile_lazily(loss)
    for state in [Tensor.view_as, *STATES, *reversed(STATES)]:
        case = Case()
        prepared = [state(z, z) if state is Tensor.view_as else state(z) for z in (case.z, case.eager)]
        ours, theirs = (f(z) for f, z in zip((compiled, loss), prepared, strict=True))
        torch.testing.assert_close(ours, theirs)
        if theirs.requires_grad:
            ours.backward()
            theirs.backward()
        case.same_gradients(rtol=1e-5, atol=1e-6)  # the loss is taken in float32


# What a compiled function edits


def scaled(m: Model, z: Tensor, y: Tensor) -> Tensor:
    z.mul_(2)
    return ce(z, y)


def filled_by_a_view(m: Model, z: Tensor, y: Tensor) -> Tensor:
    rows = z.view(-1, V)
    rows[..., 3] = -5.0
    z[0, 0] = 1.0
    return ce(rows, y)


def scaled_without_a_gradient(m: Model, z: Tensor, y: Tensor) -> Tensor:
    z.detach().mul_(2)
    with torch.no_grad():
        z += 1.0
    return ce(z, y)


def read_first(m: Model, z: Tensor, y: Tensor) -> Tensor:
    loss = ce(z, y)
    z /= m.scale
    return loss + ce(z, y)


@torch._functorch.config.patch(donated_buffer=False)  # or torch keeps no graph of dynamic shapes
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("edit", [scaled, filled_by_a_view, scaled_without_a_gradient, read_first])
def test_an_edit_is_seen_by_the_program(
    edit: Callable[..., Tensor], dynamic: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    """By whoever has the logits, or a view of them; with its gradient."""

    def f(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        loss, z = raw(m, x, y)
        torch._dynamo.graph_break()
        return loss + edit(m, z, y), z

    m, (x, y) = Model(), batch()
    compiled, _ = compile_lazily(f, dynamic=dynamic)
    ours, theirs = compiled(m, x, y), f(m, x, y)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(gradients(m, r[0] + total(r[1:])) for r in (ours, theirs)))
    assert "failed" not in caplog.text


def test_an_edit_of_what_another_input_is_a_view_of_is_refused() -> None:
    def first(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return raw(m, x, y)

    def second(z: Tensor, rows: Tensor, y: Tensor) -> Tensor:
        z.mul_(2)
        return ce(rows, y)

    m, (x, y) = Model(), batch()
    _, z = compile_lazily(first)[0](m, x, y)
    assert lazies([z])
    with pytest.raises(LazyLogitsError, match="edited"):
        compile_lazily(second)[0](z, z.view(-1, V), y)
