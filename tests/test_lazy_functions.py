"""What is done to lazy logits without making them: questions, other forms, slices of rows, reductions."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lazy_cases import B, Case, T, V, assert_same, lazy, outcome, rows_made
from torch import Tensor

from inductor_ce.api import lazy_functions
from inductor_ce.api.lazy_logits import LazyLogits

# Questions

QUESTIONS: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda z: z.shape,
    "size": lambda z: (z.size(), z.size(-1), z.size(dim=0)),
    "dtype": lambda z: (z.dtype, z.type(), z.itemsize, z.element_size(), z.nbytes),
    "device": lambda z: (z.device, z.is_cuda, z.is_cpu, z.get_device()),
    "dim": lambda z: (z.dim(), z.ndim, z.ndimension(), len(z)),
    "numel": lambda z: (z.numel(), z.nelement(), torch.numel(z)),
    "stride": lambda z: (z.stride(), z.stride(0), z.is_contiguous(), z.storage_offset(), z.layout),
    "kind": lambda z: (z.is_floating_point(), torch.is_floating_point(z), z.is_complex(), z.is_signed()),
    "sparse": lambda z: (z.is_sparse, z.is_quantized, z.is_meta, z.is_nested),
    "gradient": lambda z: (z.requires_grad, z.is_leaf, z.grad_fn is not None, z.retains_grad),
    "inference": lambda z: z.is_inference(),
    "grad": lambda z: z.detach().grad,
    "truth": lambda z: (z is not None, isinstance(z, Tensor), torch.is_tensor(z), callable(z)),
    "promotion": lambda z: (torch.result_type(z, 1), torch.is_same_size(z, z), z.is_same_size(z)),
    "hash": lambda z: len({z, z}),
    "zeros": lambda z: (torch.zeros_like(z), z.new_zeros(3), z.new_empty(2, 1).shape, torch.ones_like(z)),
    "full": lambda z: (z.new_full((2,), 1.0), z.new_tensor([1.0]), torch.full_like(z, 2.0), z.new_ones(1)),
    "other kinds": lambda z: (torch.zeros_like(z, dtype=torch.int32), z.new_zeros(2, dtype=torch.bool)),
    "random": lambda z: (torch.rand_like(z).shape, torch.randn_like(z).dtype, torch.empty_like(z).shape),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_questions(question: str) -> None:
    case = Case()
    assert_same(QUESTIONS[question](case.z), QUESTIONS[question](case.eager))
    assert not case.z.is_made


def test_repr() -> None:
    z = Case().z
    assert repr(z) == f"LazyLogits(size=({B}, {T}, {V}), dtype=torch.float64, device=cpu, not made)"
    assert str(z) == f"{z}" == repr(z)
    z.made()
    assert repr(z).startswith("tensor([[[")


# Other forms, and slices of rows

FORMS: dict[str, Callable[[Tensor], Any]] = {
    "float": lambda z: z.float(),
    "half": lambda z: z.half(),
    "bfloat16": lambda z: z.bfloat16(),
    "double": lambda z: z.double(),
    "to a dtype": lambda z: z.to(torch.float32),
    "to by name": lambda z: z.to(dtype=torch.float32, non_blocking=True),
    "to a device": lambda z: z.to("cpu"),
    "to both": lambda z: z.to("cpu", torch.float32),
    "to another": lambda z: z.to(torch.zeros((), dtype=torch.bfloat16)),
    "type": lambda z: z.type(torch.float32),
    "type_as": lambda z: z.type_as(torch.zeros((), dtype=torch.float32)),
    "twice": lambda z: z.bfloat16().float(),
    "detach": lambda z: z.detach(),
    "torch.detach": lambda z: torch.detach(z),
    "data": lambda z: z.data,
    "contiguous": lambda z: z.contiguous(),
    "clone": lambda z: z.clone(),
    "torch.clone": lambda z: torch.clone(z, memory_format=torch.preserve_format),
    "everything": lambda z: z[()],
    "dots": lambda z: z[...],
    "colons": lambda z: z[:, :],
    "view": lambda z: z.view(-1, V),
    "view by tuple": lambda z: z.view((B * T, V)),
    "reshape": lambda z: torch.reshape(z, (T, B, V)),
    "flatten": lambda z: z.flatten(0, 1),
    "unflatten": lambda z: z.flatten(0, 1).unflatten(0, (T, B)),
    "squeeze": lambda z: z.unsqueeze(0).squeeze(0),
    "unsqueeze": lambda z: torch.unsqueeze(z, 1),
    "view_as": lambda z: z.view_as(torch.empty(T, B, V)),
    "chain": lambda z: z.float().contiguous().view(-1, V).clone(),
}
SLICES: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "last": (lambda z: z[:, -1], B),
    "some": (lambda z: z[:, -3:], 3 * B),
    "all but last": (lambda z: z[..., :-1, :], (T - 1) * B),
    "all but last by colons": (lambda z: z[:, :-1, :], (T - 1) * B),
    "one": (lambda z: z[1], T),
    "a row": (lambda z: z[1, 2], 1),
    "by a step": (lambda z: z[:, ::2], 3 * B),
    "mask": (lambda z: z[torch.arange(B * T).view(B, T) % 3 == 0], 4),
    "mask of one dimension": (lambda z: z[torch.tensor([False, True])], T),
    "numpy mask": (lambda z: z[np.arange(B * T).reshape(B, T) % 3 == 0], 4),
    "pairs": (lambda z: z[torch.arange(B), torch.tensor([4, 1])], B),
    "lists": (lambda z: z[[0, 1], [4, 1]], B),
    "range": (lambda z: z[:, range(2)], 2 * B),
    "no rows": (lambda z: z[:, []], 0),
    "scalar tensor": (lambda z: z[torch.tensor(1)], T),
    "numpy scalar": (lambda z: z[np.int64(1), np.int32(-1)], 1),
    "new dimension": (lambda z: z[None, :, -1], B),
    "rows that are all": (lambda z: z[:B], B * T),
    "select": (lambda z: z.select(1, -1), B),
    "torch.select": (lambda z: torch.select(z, dim=1, index=2), B),
    "narrow": (lambda z: z.narrow(1, 1, 2), 2 * B),
    "narrow from the end": (lambda z: torch.narrow(z, 1, -2, 2), 2 * B),
    "index_select": (lambda z: z.index_select(1, torch.tensor([3, 3, 0])), 3 * B),
    "unbind": (lambda z: z.unbind(1)[2], B),
    "torch.unbind": (lambda z: torch.unbind(z)[-1], T),
    "split": (lambda z: z.split(2, dim=1)[2], B),
    "split by lengths": (lambda z: torch.split(z, [1, 4], 1)[1], 4 * B),
    "chunk": (lambda z: z.chunk(2, 1)[1], 2 * B),
    "iteration": (lambda z: list(z)[1], T),
    "slice of a slice": (lambda z: z[0][:, None][2:4], 2),
    "slice of a cast": (lambda z: z.float()[:, -1].bfloat16(), B),
    "slice of a view": (lambda z: z.view(-1, V)[3:5], 2),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_forms_stay_lazy(form: str, grad: bool) -> None:
    case = Case()
    with torch.set_grad_enabled(grad):
        ours, theirs = FORMS[form](case.z), FORMS[form](case.eager)
    assert isinstance(ours, LazyLogits)
    assert not ours.is_made
    if not grad and theirs is not case.eager:
        theirs = theirs.detach()  # a view that is made without gradients is a leaf of which one is wanted
    assert ours.requires_grad == theirs.requires_grad
    assert ours.is_leaf == theirs.is_leaf
    assert ours.stride() == theirs.stride()
    if theirs.requires_grad:
        factor = torch.arange(V, dtype=theirs.dtype)
        (ours * factor).sum().backward()
        (theirs * factor).sum().backward()
        case.same_gradients()
    assert_same(ours.made(), theirs)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", SLICES)
def test_slices_make_their_rows_alone(name: str, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case, (slice_of, rows) = Case(), SLICES[name]
    made = rows_made(monkeypatch)
    with torch.set_grad_enabled(grad):
        ours, theirs = slice_of(case.z), slice_of(case.eager)
    theirs = theirs if grad else theirs.detach()
    assert isinstance(ours, LazyLogits)
    assert made == []
    assert_same(ours, theirs, strides=False)
    if theirs.requires_grad:
        ours.sin().sum().backward()
        theirs.sin().sum().backward()
        case.same_gradients()
    assert made == [rows]
    assert not case.z.is_made


NOT_ROWS: dict[str, Callable[[Tensor], Any]] = {
    "columns": lambda z: z[..., :3],
    "a column": lambda z: z[..., 0],
    "mask of all": lambda z: z[torch.ones(B, T, V, dtype=torch.bool)],
    "byte mask of all": lambda z: z[torch.ones(B, T, V, dtype=torch.bool).numpy()],
    "a new last dimension": lambda z: z[..., None],
    "a truth value": lambda z: z[True],
    "single elements": lambda z: z[0, 0, 0],
    "columns by split": lambda z: z.split(4, -1),
    "columns by chunk": lambda z: torch.chunk(z, 3, dim=2),
    "columns by unbind": lambda z: z.unbind(-1),
    "columns by narrow": lambda z: z.narrow(2, 1, 3),
    "columns by index": lambda z: z.index_select(2, torch.tensor([1])),
    "transposed": lambda z: z.transpose(1, 2),
    "all in one": lambda z: z.flatten(),
    "rows in the classes": lambda z: z.view(B, -1),
    "other bits": lambda z: z.detach().view(torch.int64),
    "integers": lambda z: z.long(),
    "a copy in the same dtype": lambda z: z.to(torch.float64, copy=True),
    "to another device": lambda z: z.detach().to("meta").shape,
    "channels last": lambda z: z.unsqueeze(0).contiguous(memory_format=torch.channels_last),
    "clone in channels last": lambda z: z.unsqueeze(0).clone(memory_format=torch.channels_last),
    "integer index of no dimension": lambda z: z.index_select(1, torch.tensor(1)),
}
WRONG: dict[str, Callable[[Tensor], Any]] = {
    "an index too far": lambda z: z[2],
    "a dimension too far": lambda z: z.select(4, 0),
    "a mask of another shape": lambda z: z[torch.ones(3, dtype=torch.bool)],
    "lengths that do not add up": lambda z: z.split([1, 2], 1),
    "too much": lambda z: z.narrow(1, 3, 3),
    "another size": lambda z: z.view(3, -1, V),
    "no chunks": lambda z: z.chunk(0, 1),
    "unbind too far": lambda z: z.unbind(7),
    "reduced too far": lambda z: z.detach().argmax(5),
}


@pytest.mark.parametrize("name", NOT_ROWS)
def test_what_is_no_slice_of_rows_is_made(name: str) -> None:
    case = Case()
    assert_same(NOT_ROWS[name](case.z), NOT_ROWS[name](case.eager))


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_those_of_eager(name: str) -> None:
    case = Case()
    error = outcome(WRONG[name], case.eager)
    assert issubclass(error, Exception)
    assert outcome(WRONG[name], case.z) == error


# Reductions

REDUCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda z: z.argmax(-1),
    "argmax of the last": lambda z: torch.argmax(z, dim=2, keepdim=True),
    "argmin": lambda z: z.argmin(dim=-1),
    "max": lambda z: z.max(-1),
    "max by name": lambda z: torch.max(z, dim=-1, keepdim=True),
    "amax": lambda z: (z.amax(-1), z.amax((-1,)), torch.amax(z, 2, True)),
    "logsumexp": lambda z: (z.logsumexp(-1), torch.logsumexp(z, dim=2, keepdim=True)),
    "topk": lambda z: (*z.topk(3), *torch.topk(z, 2, dim=-1, largest=False)),
    "gather": lambda z: z.gather(-1, torch.arange(B * T).view(B, T, 1)),
    "log_softmax": lambda z: z.log_softmax(-1).gather(-1, torch.arange(B * T).view(B, T, 1)),
    "log_softmax in float32": lambda z: F.log_softmax(z, -1, dtype=torch.float32).logsumexp(-1),
    "softmax": lambda z: torch.softmax(z, dim=2).max(dim=-1).values,
    "log_softmax of rows": lambda z: torch.log_softmax(z[:, -2:].float(), -1).amax(-1),
    "of a row": lambda z: z[0, 1].argmax(0),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_go_by_chunks(name: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case, reduction = Case(), REDUCTIONS[name]
    made = rows_made(monkeypatch)
    monkeypatch.setattr(lazy_functions, "CHUNK_BYTES", 3 * V * 4)
    with mode():
        assert_same(reduction(case.z), reduction(case.eager))
    assert made
    assert max(made) <= 3
    assert not case.z.is_made


@pytest.mark.parametrize("value", [0.0, float("nan"), float("-inf")])
def test_ties_and_what_is_no_number(value: float) -> None:
    case = Case()
    for h in (case.parts[0], case.copies[0]):
        h.detach()[0].fill_(value)
    case.__init__()  # the parts are changed before the logits are returned
    with torch.no_grad():
        for f in (lambda z: z.argmax(-1), lambda z: z.max(-1), lambda z: z.logsumexp(-1)):
            torch.testing.assert_close(f(case.z), f(case.eager), equal_nan=True)


def test_reductions_with_a_gradient() -> None:
    case = Case()
    ours, theirs = ((z.logsumexp(-1) + z.max(-1).values + z.amax(-1)).sum() for z in (case.z, case.eager))
    assert_same(ours, theirs)
    ours.backward()
    theirs.backward()
    case.same_gradients()


@pytest.mark.parametrize(
    "whole", [lambda z: z.argmax(), lambda z: z.max(), lambda z: z.max(z), lambda z: z.argmax(1)]
)
def test_other_reductions(whole: Callable[[Tensor], Any]) -> None:
    case = Case()
    assert_same(whole(case.z), whole(case.eager))


# Gradients along several ways, threads, memory


def mixed(z: Tensor) -> Tensor:
    loss = z.float().square().mean().double() + z[:, -1].exp().mean()
    y = torch.arange(B * T)
    loss = (
        loss
        + F.cross_entropy(z.view(-1, V), y)
        + F.cross_entropy(z[..., :-1, :].flatten(0, 1).double(), y[2:])
    )
    return loss + (z.unsqueeze(0).sin() * z.detach()).sum() + sum(row.sum() for row in z)


@pytest.mark.parametrize("made_before", [False, True])
def test_gradients_along_all_ways(made_before: bool) -> None:
    case = Case()
    if made_before:
        with torch.no_grad():
            assert_same(case.z.sum(), case.eager.sum())
    ours, theirs = mixed(case.z), mixed(case.eager)
    assert_same(ours, theirs)
    ours.backward()
    theirs.backward()
    case.same_gradients()


def test_nothing_is_kept() -> None:
    """What the logits are made of goes with them, without the collector of cycles."""
    case = Case()
    z, h = case.z, case.parts[0].detach().clone().requires_grad_()
    gc.collect()
    gc.disable()
    try:
        z = lazy(h, case.parts[1])
        loss = z.float()[:, -1].sum() + z.view(-1, V).sum() + z.detach().mean()
        loss.backward()
        z[0].detach().zero_()
        hidden, made = weakref.ref(h), weakref.ref(z)
        del z, h, loss
        assert made() is None
        assert hidden() is None
    finally:
        gc.enable()
