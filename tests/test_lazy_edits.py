"""Lazy logits that are written to, and those whose parts have changed or are no longer there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lazy_cases import B, Case, T, V, assert_same, outcome
from torch import Tensor

from inductor_ce.common.errors import LazyLogitsError

# Edits


def operator_edit(z: Tensor) -> None:
    z += 1


def item_edit(z: Tensor) -> None:
    z[:, 1] = 7.0


EDITS: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda z: z.mul_(2),
    "operator": operator_edit,
    "setitem": item_edit,
    "masked_fill_": lambda z: z.masked_fill_(torch.arange(V) % 2 == 0, -1.0),
    "out": lambda z: torch.add(torch.ones_like(z), 1, out=z),
    "zero_": lambda z: z.zero_(),
    "copy_": lambda z: z.copy_(torch.arange(V)),
    "activation": lambda z: F.relu(z, inplace=True),
    "clamp_": lambda z: torch.clamp_(z, -0.5, 0.5),
    "foreach": lambda z: torch._foreach_mul_([z], 2.0),
    "generator": lambda z: z.fill_(3.0),
}
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda z: z.view(-1, V),
    "last": lambda z: z[:, -1:],
    "detach": lambda z: z.detach(),
    "data": lambda z: z.data,
    "row": lambda z: z[0],
    "unsqueeze": lambda z: z.unsqueeze(0),
    "view of a view": lambda z: z.view(-1, V)[2:8].detach(),
    "narrow": lambda z: z.narrow(1, 1, 3),
    "split": lambda z: z.split(2, 1)[1],
}
COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda z: z.float(),
    "clone": lambda z: z.clone(),
    "rows by index": lambda z: z[torch.tensor([1, 0])],
    "mask": lambda z: z[torch.ones(B, T, dtype=torch.bool)],
    "a cast of a view": lambda z: z[:, -1].float(),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("edit", EDITS)
def test_edits(edit: str, grad: bool) -> None:
    """The tensor itself, and every name for it, reads as edited, in value and gradient."""
    case = Case()
    x, y = (case.z, case.eager) if grad else (case.z.detach(), case.eager.detach())
    if grad and edit == "out":
        assert outcome(EDITS[edit], x) is outcome(EDITS[edit], y) is RuntimeError
        return
    EDITS[edit](x)
    EDITS[edit](y)
    assert (x.requires_grad, x.is_leaf, x.grad_fn is None) == (y.requires_grad, y.is_leaf, y.grad_fn is None)
    torch.testing.assert_close(x.clone(), y.clone(), rtol=0, atol=0)
    if grad:
        for z in (x, y):
            z.square().sum().backward()
        case.same_gradients()


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_an_edit_of_a_view_is_seen_in_the_base_and_the_reverse(view: str, made: bool) -> None:
    case = Case()
    results = []
    for z in (case.z, case.eager):
        z = z.detach()
        if made:
            z.sum()
        base_edited = VIEWS[view](z)
        view_edited, other = VIEWS[view](z), z.view(T, B, V)[1:]
        view_edited.mul_(3)
        z.add_(1)
        results.append([x.clone() for x in (z, base_edited, view_edited, other, z[0], z.float())])
    assert_same([x * 1 for x in results[0]], results[1])


def test_an_edit_of_a_view_has_its_gradient() -> None:
    case = Case()
    for z in (case.z, case.eager):
        last = z[:, -1]
        last.mul_(3)
        (z.square().sum() + last.sum()).backward()
    case.same_gradients()


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_keeps_what_was_there_before_the_edit(name: str, read_before: bool) -> None:
    case = Case()
    results = []
    for z in (case.z, case.eager):
        kept = COPIES[name](z)
        if read_before:
            kept.sum()
        z.mul_(3)
        results.append(kept * 1)
        (kept.sum() + z.sum()).backward()
    assert_same(*results)
    case.same_gradients()


def test_what_is_written_through_its_memory_is_read() -> None:
    for write in (
        lambda z: z.numpy().fill(2),
        lambda z: z.data.fill_(2),
        lambda z: z.untyped_storage().fill_(0),
    ):
        results = []
        case = Case()
        for z in (case.z.detach(), case.eager.detach()):
            z.sum()
            write(z)
            results.append(z * 1)
            assert not getattr(z, "is_ours", False)
        assert_same(*results)


# One memory, whoever writes there, and whatever was read before


def plain_view_of_the_base(z: Tensor) -> list[Tensor]:
    v, w = z[:, -1], z.view(-1, V)
    v.sum(), w.sum()
    t = z.transpose(0, 1)
    t.mul_(2)
    return [z, v, w, t]


def columns_of_the_base(z: Tensor) -> list[Tensor]:
    v = z[:, -1]
    v.sum()
    z[..., :3].mul_(2)
    return [z, v]


def plain_view_of_rows(z: Tensor) -> list[Tensor]:
    v = z[:, -1]
    t = v.T
    t.mul_(2)
    return [z, v, t]


def plain_view_of_a_view(z: Tensor) -> list[Tensor]:
    v = z.view(-1, V)
    v.sum()
    t = v.mT
    t.mul_(2)
    return [z, v, t]


def view_of_a_view_that_was_read(z: Tensor) -> list[Tensor]:
    v = z[:, -1]
    v.sum()
    u = v.unsqueeze(1)
    r = u.view(-1, V)
    r.mul_(2)
    return [z, v, u, r]


def one_entry(z: Tensor) -> list[Tensor]:
    v = z[0, -1]
    p = v[3]
    p.mul_(3)
    return [z, v, p]


def rows_in_a_loop(z: Tensor) -> list[Tensor]:
    z = z.detach()
    v = z[:, -1]
    v.sum()
    rows = list(v)
    rows[0].mul_(2)
    return [z, v, *rows]


def contiguous_rows(z: Tensor) -> list[Tensor]:
    v = z[:, 1:]
    w = v.contiguous()
    w.mul_(2)
    return [z, v, w]


def contiguous_rows_that_were_read(z: Tensor) -> list[Tensor]:
    v = z[:, 1:]
    v.sum()
    w = v.contiguous()
    w.mul_(2)
    return [z, v, w]


def reshaped_rows(z: Tensor) -> list[Tensor]:
    v = z[:, 1:]
    w = v.reshape(-1, V)
    w.mul_(2)
    return [z, v, w]


def contiguous_rows_of_what_is_edited(z: Tensor) -> list[Tensor]:
    w = z[:, 1:].contiguous()
    z.mul_(2)
    return [z, w]


def edited_without_a_gradient(z: Tensor) -> list[Tensor]:
    z = z.detach()
    v, w = z[:, -1], z.view(-1, V)
    v.sum()
    z[..., :3].fill_(1.0)
    w[2:].T.fill_(0.5)
    return [z, v, w]


def a_gradient_that_the_edit_brings(z: Tensor) -> list[Tensor]:
    d = z.detach()
    e = d.view(-1, V)
    d.mul_(z.sum())
    return [z, d, e]


def numpy_of_rows(z: Tensor) -> list[Tensor]:
    z = z.detach()
    v = z[:, -1]
    v.sum()
    v.numpy()[:] = 1
    return [z, v, z.view(-1, V)]


ONE_MEMORY: list[Callable[[Tensor], list[Tensor]]] = [
    *(plain_view_of_the_base, columns_of_the_base, plain_view_of_rows, plain_view_of_a_view),
    *(view_of_a_view_that_was_read, one_entry, rows_in_a_loop, contiguous_rows),
    *(contiguous_rows_that_were_read, reshaped_rows, contiguous_rows_of_what_is_edited),
    *(edited_without_a_gradient, a_gradient_that_the_edit_brings, numpy_of_rows),
]


@pytest.mark.parametrize("edit", ONE_MEMORY)
def test_views_are_in_one_memory_and_copies_are_not(edit: Callable[[Tensor], list[Tensor]]) -> None:
    case = Case()
    results = []
    for z in (case.z, case.eager):
        edited = edit(z)
        results.append([x * 1 for x in edited])
        of = [x.sin().sum() for x in edited if x.requires_grad]
        if of:
            torch.stack(of).sum().backward()
    assert_same(*results)
    case.same_gradients()


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_laid_out_as_in_eager(view: str) -> None:
    case = Case()
    ours, theirs = VIEWS[view](case.z), VIEWS[view](case.eager)
    for made in (False, True):
        assert ours.is_made == made
        assert (ours.stride(), ours.is_contiguous()) == (theirs.stride(), theirs.is_contiguous())
        ours.sum()


@pytest.mark.parametrize("hook", [lambda v: v.retain_grad(), lambda v: v.register_hook(lambda g: g * 3)])
def test_an_edit_that_hooks_of_a_view_would_not_see_is_refused(hook: Callable[[Tensor], Any]) -> None:
    for edited in (lambda z, v: z.mT, lambda z, v: v.mT):
        z = Case().z
        v = z[:, 1:]
        hook(v)
        edited(z, v).mul_(2)
        with pytest.raises(LazyLogitsError, match="have hooks"):
            [v.sum(), z.sum()]


def test_rows_that_are_read_late_have_what_was_read() -> None:
    """Where the others can be made no more, nobody else sees an edit."""
    case = Case()
    v = case.z[:, -1]
    v.sum()
    in_place(*case.parts)
    assert_same(v.T * 1, case.eager[:, -1].T * 1)


# Never a wrong number


def step_of_an_optimizer(h: Tensor, W: Tensor) -> None:
    W.grad = torch.ones_like(W)
    torch.optim.AdamW([W], lr=0.1, foreach=True).step()


@torch.no_grad()
def in_place(h: Tensor, W: Tensor) -> None:
    W.add_(1)


@torch.no_grad()
def all_in_place(h: Tensor, W: Tensor) -> None:
    torch._foreach_add_([W], 1)


@torch.no_grad()
def hidden_states(h: Tensor, W: Tensor) -> None:
    h[0].zero_()


def freed(h: Tensor, W: Tensor) -> None:
    W.untyped_storage().resize_(0)


CHANGES = {
    step_of_an_optimizer: r"the weight \[16x4\] was changed in place since",
    in_place: r"the weight \[16x4\] was changed in place since",
    all_in_place: r"the weight \[16x4\] was changed in place since",
    hidden_states: "the hidden states was changed in place since",
    freed: r"the weight \[16x4\] was freed since",
}
LATE: list[Callable[[Tensor], Any]] = [
    *(lambda z: z.sum(), lambda z: z[:, -1], lambda z: z.detach().argmax(-1), lambda z: z.float()),
    *(lambda z: z.clone(), lambda z: z.mul_(2), lambda z: z.view(-1, V), lambda z: z.detach().numpy()),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_longer_there(change: Callable[[Tensor, Tensor], None]) -> None:
    for late in LATE:
        case = Case()
        forms = [case.z, case.z.float(), case.z[:, -1:].contiguous(), case.z.detach().unsqueeze(0)[0]]
        change(*case.parts)
        for z in forms:
            with pytest.raises(LazyLogitsError, match=CHANGES[change]) as error:
                late(z).sum()
            assert not z.is_made
            assert "before backward()" if change is freed else "before optimizer.step()" in str(error.value)
            assert 'returned_logits="eager"' in str(error.value)


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_made_before_is_still_there(change: Callable[[Tensor, Tensor], None]) -> None:
    case = Case()
    case.z.sum()
    change(*case.parts)
    assert_same(case.z * 1, case.eager * 1)
    assert_same(case.z[:, -1] * 1, case.eager[:, -1] * 1)
