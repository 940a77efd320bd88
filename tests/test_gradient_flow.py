"""To whom gradients flow: where some of a loss is detached of the logits, and numbers beside it learn."""

from __future__ import annotations

import linecache
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Rewritten
from pairwise import EVERYTHING
from torch import Tensor

N, V = 6, 12


def given(seed: int = 0) -> tuple[Tensor, ...]:
    """Logits, a number and one for each row, which learn; weights of all classes, and labels."""
    torch.manual_seed(seed)
    leaves = torch.randn(N, V), torch.randn(1 if seed % 2 else ()) / 3, torch.rand(N)
    return *(x.double().requires_grad_() for x in leaves), torch.rand(N, V).double(), torch.randint(V, (N,))


def measured(f: Callable[..., Tensor], seed: int) -> list[Tensor]:
    """The loss and three gradients, 0 where there is none."""
    args = given(seed)
    loss = f(*args).sum()
    gradients = torch.autograd.grad(loss, args[:3], materialize_grads=True) if loss.requires_grad else ()
    return [loss.detach(), *gradients]


def check(f: Callable[..., Tensor], seed: int = 0) -> Rewritten:
    backend = Rewritten()
    ours, eager = measured(torch.compile(f, backend=backend), seed), measured(f, seed)
    torch.testing.assert_close(ours, eager, rtol=1e-9, atol=1e-10)
    return backend


def sac_temperature(z: Tensor, a: Tensor, w: Tensor, q: Tensor, y: Tensor) -> Tensor:
    """Soft actor-critic over discrete actions: the policy is a constant to the temperature's loss."""
    log_p, p = F.log_softmax(z, 1), F.softmax(z, 1)
    actor = (p * (a.exp().detach() * log_p - q)).mean()
    return actor + (p.detach() * (-a.exp() * (log_p + 2.0).detach())).mean()


def temperature_of_samples(z: Tensor, a: Tensor, w: Tensor, q: Tensor, y: Tensor) -> Tensor:
    log_p = F.log_softmax(z, 1).gather(1, y[:, None])[:, 0]
    return -(a * (log_p + 2.0).detach()).mean() + (w * log_p).mean()


def under_no_grad(z: Tensor, a: Tensor, w: Tensor, q: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1) * a
    return (entropy * w * a).sum() + F.cross_entropy(z, y)


def target_under_no_grad(z: Tensor, a: Tensor, w: Tensor, q: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        target = F.one_hot(y, V) * a
    return -(target * z.log_softmax(-1)).sum()


def target_detached(z: Tensor, a: Tensor, w: Tensor, q: Tensor, y: Tensor) -> Tensor:
    return -((F.one_hot(y, V) * w[:, None]).detach() * z.log_softmax(-1)).sum()


def target_edited_under_no_grad(z: Tensor, a: Tensor, w: Tensor, q: Tensor, y: Tensor) -> Tensor:
    target = F.one_hot(y, V).double()
    with torch.no_grad():
        target *= a
    return -(target * z.log_softmax(-1)).sum()


def entries_detached(z: Tensor, a: Tensor, w: Tensor, q: Tensor, y: Tensor) -> Tensor:
    return -((z.log_softmax(-1) * a).detach() * z.detach().log_softmax(-1)).sum()


def rows_of_entries_detached(z: Tensor, a: Tensor, w: Tensor, q: Tensor, y: Tensor) -> Tensor:
    p = (q.softmax(-1) * w[:, None]).detach()
    return (p * z.log_softmax(-1).square()).sum()


def first_under_no_grad(z: Tensor, a: Tensor, w: Tensor, q: Tensor, y: Tensor) -> Tensor:
    """The same logits are read under no_grad, and then where gradients are on."""
    other, z = z.view(2, 3, V) * w.view(2, 3, 1), z.view(2, 3, V) * 2.0
    p, log_p = z.softmax(-1) * 1.0, other.log_softmax(-1)
    kl = F.kl_div(log_p, p.softmax(-1), reduction="none").sum(-1)
    with torch.no_grad():
        entropy = -(p.detach() * p.log_softmax(-1)).sum(-1)
    return kl.sum() - (z * log_p.log_softmax(-1)).sum() + entropy.sum()


def rows_cut_under_no_grad(z: Tensor, a: Tensor, w: Tensor, q: Tensor, y: Tensor) -> Tensor:
    other, z = z.view(2, 3, V) * w.view(2, 3, 1), z.view(2, 3, V) * 2.0
    with torch.no_grad():
        cut = z[:, :-1]
        first = F.kl_div(other[:, :-1].log_softmax(-1), cut.softmax(-1), reduction="sum")
    return F.kl_div(other[:, :-1].log_softmax(-1), z[:, :-1].softmax(-1), reduction="sum") + first


def cast_to_itself(z: Tensor, a: Tensor, w: Tensor, q: Tensor, y: Tensor) -> Tensor:
    """Where the dtype is that already, a cast under no_grad is the tensor itself, and has its gradient."""
    with torch.no_grad():
        same, copied = z.double(), z.float()
    return F.cross_entropy(same, y) + F.cross_entropy(copied.double(), y)


def rows_cast_to_themselves(z: Tensor, a: Tensor, w: Tensor, q: Tensor, y: Tensor) -> Tensor:
    lse = z.logsumexp(-1)
    with torch.no_grad():
        lse = lse.to(z.dtype)
    return (lse - z.gather(-1, y[:, None])[:, 0]).sum()


CUT = [
    *(cast_to_itself, rows_cast_to_themselves),
    *(target_under_no_grad, target_detached, target_edited_under_no_grad, entries_detached),
    *(rows_of_entries_detached, first_under_no_grad, rows_cut_under_no_grad),
]


@pytest.mark.parametrize("f", CUT)
def test_where_a_gradient_is_cut_it_stays_cut(f: Callable[..., Tensor]) -> None:
    """And nowhere else. What has none is not 0."""
    ours, eager = given(), given()
    losses = torch.compile(f, backend=Rewritten())(*ours), f(*eager)
    assert losses[0].requires_grad == losses[1].requires_grad
    for loss in losses if losses[1].requires_grad else ():
        loss.backward()
    for mine, exact in zip(ours[:3], eager[:3], strict=True):
        assert (mine.grad is None) == (exact.grad is None)
    check(f)


@pytest.mark.parametrize("f", [sac_temperature, temperature_of_samples, under_no_grad])
def test_numbers_beside_what_is_detached_keep_their_gradient(f: Callable[..., Tensor]) -> None:
    backend = check(f)
    assert backend.report.sites


CONSTANT: dict[str, Callable[[Tensor], Tensor]] = {
    "of a row": lambda p: p.sum(-1),
    "of all": lambda p: p.sum(-1).mean(),
    "twice": lambda p: 2 * p.sum(-1),
}
BESIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "the largest": lambda p: p.detach().amax(-1),
    "one": lambda p: p.detach()[:, 0],
    "the entropy": lambda p: (p.detach() * p.detach().log()).sum(-1),
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("constant", CONSTANT)
def test_what_is_constant_has_a_gradient_of_0(constant: str, beside: str) -> None:
    """Probabilities' sum, beside what is detached: who asks for the gradient, as of eager's, gets one."""

    def f(z: Tensor) -> Tensor:
        p = F.softmax(z, -1)
        return CONSTANT[constant](p) + BESIDE[beside](p)

    z = given()[0]
    loss = torch.compile(f, backend=Rewritten())(z)
    torch.testing.assert_close(loss, f(z), rtol=1e-9, atol=1e-10)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(gradient, torch.zeros_like(z), rtol=0, atol=1e-10)


ROWS = (
    *("lp.gather(1, y[:, None])[:, 0]", "lp[torch.arange(6), y]", "z.logsumexp(-1)", "-(p * lp).sum(-1)"),
    *("p.max(-1).values", "(p * q).sum(-1)", "lp.mean(-1)", "(p * (a.detach() * lp - q)).sum(-1)"),
    *("(p.detach() * lp).sum(-1)", "(p * lp.detach()).sum(-1)", "F.cross_entropy(z, y, reduction='none')"),
    *("(p.detach() * (-a.exp() * (lp + 1.0).detach())).sum(-1)", "(p * w[:, None]).sum(-1)"),
    "(lp.detach() * w[:, None] * q).sum(-1)",
)


def rows(draw: random.Random, depth: int) -> str:
    """The text of numbers of rows: what is told of probabilities, detached, weighed and joined."""
    if depth <= 0 or draw.random() < 0.35:
        return draw.choice(ROWS)
    one = f"({rows(draw, depth - 1)})"
    alone = (f"{one}.detach()", f"{one} * w", f"{one} * a", f"{one} + w", f"torch.relu({one})")
    return draw.choice((*alone, *(f"({one} {sign} ({rows(draw, depth - 1)}))" for sign in "+-*")))


def program(seed: int) -> Callable[..., Any]:
    draw = random.Random(seed)
    block = "torch.no_grad()" if draw.random() < 0.3 else "torch.enable_grad()"
    text = (
        "def f(z, a, w, q, y):\n    lp, p = F.log_softmax(z, -1), F.softmax(z, -1)\n"
        f"    with {block}:\n        c = {rows(draw, 2)}\n"
        f"    of_a = a * ({rows(draw, 2)}).detach().mean()\n"
        f"    return ({rows(draw, 3)}).mean() + (c * {rows(draw, 1)}).sum() + of_a\n"
    )
    scope, name = {"torch": torch, "F": F}, f"<gradient flow {seed}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    exec(compile(text, name, "exec"), scope)
    return scope["f"]


@pytest.mark.parametrize("seed", range(120 if EVERYTHING else 20))
def test_at_random(seed: int) -> None:
    check(program(seed), seed)
