"""Gradients through lazy logits and of them: hooks, functions of autograd, leaves, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lazy_cases import Case, Scaled, V, assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from inductor_ce.common.errors import LazyLogitsError


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z * z

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return upstream * 2 * z


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda z: z.sin().sum(),
    "cast": lambda z: z.float().sin().sum(),
    "slice": lambda z: z[:, -1].sin().sum(),
    "slice of a cast": lambda z: z.float()[:, -1].sin().sum(),
    "rows": lambda z: z[torch.tensor([0])].sin().sum(),
    "view": lambda z: z.view(-1, V)[3:].sin().sum(),
    "both": lambda z: z.sin().sum() + z[:, 0].sum() + z.bfloat16().float().sum(),
}


@pytest.mark.parametrize("function", [Scaled, Squared])
@pytest.mark.parametrize("way", WAYS)
def test_autograd_functions(way: str, function: type[torch.autograd.Function]) -> None:
    """No gradient goes round them, and none is lost."""
    case = Case()
    for z in (case.z, case.eager):
        result = function.apply(z)
        assert result.requires_grad
        WAYS[way](result).backward()
    case.same_gradients()


@pytest.mark.parametrize("way", WAYS)
def test_hooks(way: str) -> None:
    case = Case()
    seen: list[Tensor] = []
    for z in (case.z, case.eager):
        z.register_hook(lambda gradient: [seen.append(gradient), gradient * 3][1])
        z.retain_grad()
        WAYS[way](z).backward()
        seen.append(z.grad)
    case.same_gradients()
    assert_same(seen[:2], seen[2:])


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_the_logits(way: str) -> None:
    """Where rows have been taken already, it is an error."""
    case = Case()
    (theirs,) = torch.autograd.grad(WAYS[way](case.eager), case.eager)
    loss = WAYS[way](case.z)
    if way in ("all", "cast", "both"):
        assert_same(torch.autograd.grad(loss, case.z)[0], theirs)
        return
    for watch in (
        lambda: torch.autograd.grad(loss, case.z),
        lambda: torch.autograd.grad(loss, [case.z]),
        case.z.retain_grad,
        lambda: case.z.register_hook(print),
    ):
        with pytest.raises(LazyLogitsError, match="Rows have been taken of logits that were returned lazily"):
            watch()


def test_gradients_of_edited_logits() -> None:
    case = Case()
    results = []
    for z in (case.z, case.eager):
        z.mul_(2)
        results.append(torch.autograd.grad(z.square().sum(), z)[0])
    assert_same(*results)


def test_an_edit_of_watched_logits_is_an_error() -> None:
    z = Case().z
    z.retain_grad()
    with pytest.raises(LazyLogitsError, match="written to while they, or a view of them, have hooks"):
        z.mul_(2)


@pytest.mark.parametrize(
    "form", [lambda z: z, lambda z: z.float(), lambda z: z.view(-1, V), lambda z: z[:, -1]]
)
@pytest.mark.parametrize("backward", [torch.autograd.backward, lambda z, g: z.backward(g)])
def test_backward_from_the_logits(form: Callable[[Tensor], Tensor], backward: Callable[..., Any]) -> None:
    case = Case()
    for z in (case.z, case.eager):
        z = form(z)
        backward(z, torch.linspace(0, 1, z.numel(), dtype=z.dtype).view(z.shape))
    case.same_gradients()


def test_backward_twice() -> None:
    case = Case()
    for z in (case.z, case.eager):
        loss = z.square().sum() + z[:, -1].exp().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    case.same_gradients()


def test_backward_through_a_gradient_is_an_error() -> None:
    case = Case()
    (gradient,) = torch.autograd.grad(case.z.square().sum(), case.parts[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_leaf_of_its_own() -> None:
    """Logits that are detached and asked for a gradient keep it to themselves."""
    case = Case()
    results = []
    for z in (case.z, case.eager):
        leaf = z.detach().requires_grad_()
        (leaf.square().sum() + leaf[:, -1].sum() + leaf.float().sum()).backward()
        results.append(leaf.grad)
    assert_same(*results)
    assert case.parts[0].grad is case.parts[1].grad is None


def nothing(z: Tensor) -> None:
    pass


@pytest.mark.parametrize("before", [nothing, Tensor.sum, lambda z: z.mul_(2), lambda z: z[:, -1]])
@pytest.mark.parametrize("detach", [Tensor.detach_, torch.detach_])
def test_detached_in_place(before: Callable[[Tensor], Any], detach: Callable[[Tensor], Tensor]) -> None:
    """A leaf from then on; what was made of it before keeps its gradient."""
    case = Case()
    results = []
    for z in (case.z, case.eager):
        kept = [before(z), z.float(), z.view(-1, V), z[0]][1:]
        assert detach(z) is z
        sums = [x.sin().sum() for x in kept]
        torch.stack([x.double() for x in sums]).sum().backward()
        results.append([z * 1, z.requires_grad, z.is_leaf, z.grad_fn])
        z.requires_grad_().retain_grad()
        z.square().sum().backward()
        results[-1] += [z.detach_().grad, z.mul_(3).view(-1) * 1]
    assert_same(*results)
    case.same_gradients()


def test_a_view_is_not_detached_in_place() -> None:
    for z in (Case().z, Case().eager):
        with pytest.raises(RuntimeError, match="Can't detach views in-place"):
            z.view(-1, V).detach_()


def edit_a_view(z: Tensor) -> Tensor:
    view = z.view(-1, V)
    view[2:].mul_(3)
    return view


def edit_below_a_view(z: Tensor) -> Tensor:
    view = z.view(-1, V)
    z.mul_(3)
    return view


def edit_all(z: Tensor) -> Tensor:
    z.mul_(3)
    return z


@pytest.mark.parametrize("edit", [edit_all, edit_a_view, edit_below_a_view])
def test_backward_from_edited_logits(edit: Callable[[Tensor], Tensor]) -> None:
    """Alone and in a list, which is handed to C++ as it is."""
    for backward in (
        lambda z, edited, g: edited.backward(g),
        lambda z, edited, g: torch.autograd.backward([edited], [g]),
        lambda z, edited, g: torch.autograd.backward([z.sum(), edited, z], [None, g, g.view(z.shape)]),
        lambda z, edited, g: torch.autograd.backward((edited, z.exp().sum()), (g, None)),
    ):
        case = Case()
        for z in (case.z, case.eager):
            edited = edit(z)
            backward(z, edited, torch.linspace(0, 1, z.numel(), dtype=z.dtype).view(edited.shape))
        case.same_gradients()


def test_an_optimizer_of_logits() -> None:
    case = Case()
    results = []
    for z in (case.z, case.eager):
        leaf = z.detach().requires_grad_()
        optimizer = torch.optim.SGD([leaf], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            leaf.square().sum().backward()
            optimizer.step()
        assert leaf.is_leaf
        results.append([leaf.grad, leaf.detach() * 1])
    assert_same(*results)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    case = Case()
    for z in (case.z, case.eager):
        checkpoint(lambda z: mixed(z), z, use_reentrant=reentrant).backward()
    case.same_gradients()


def mixed(z: Tensor) -> Tensor:
    return z.sin().sum() + z[:, -1].exp().sum() + z.float().sin().sum()


def test_modules_with_hooks() -> None:
    case, seen = Case(), []
    for z in (case.z, case.eager):
        layer = nn.Linear(V, 2, bias=False, dtype=z.dtype)
        layer.weight.data.fill_(0.5)
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        layer.register_full_backward_hook(lambda module, inward, outward: seen.append(inward[0]))
        layer(z).square().sum().backward()
    assert_same(*seen)
    case.same_gradients()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whoever_looks_first_takes_no_gradient_away(mode: Any) -> None:
    case = Case()
    for z in (case.z, case.eager):
        with mode():
            z.sum()
        z.square().sum().backward()
    case.same_gradients()
