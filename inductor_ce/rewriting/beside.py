"""Beside: on which ranks that is which stands beside DTensor logits, and who reads a loss there."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..common.compat.graphs import is_dtensor, reads_local
from ..common.findings import Reason, Refusal
from ..distributed.placements import beside, beside_fact, described, numbered, read_as_ours
from ..graph.shapes import example_of, shape_of, tensor_of
from ..reading.row_views import Index, Permute, RowView, Slice
from ..reading.values import Label, LossValue, Outside, Reading
from .groups import Group, value_of


def misplaced(reading: Reading, group: Group) -> Refusal | None:
    """Why a loss over a DTensor is left: what stands beside the logits, or what is read of the loss."""
    if not group.distributed:
        return None
    facts = [_label_fact(group, held) for held in group.labels.values()]
    facts += [_outside_fact(group, held) for held in group.outside.values()]
    fact = next((fact for fact in facts if fact is not None), None)
    if fact is not None:
        return Refusal(Reason.PLACEMENTS, fact)
    refusals = (_refusal_of_reader(reading, group, node) for node in group.nodes)
    return next((refusal for refusal in refusals if refusal is not None), None)


def _label_fact(group: Group, held: Label) -> str | None:
    z: Any = tensor_of(group.logits.node)
    axis, moved = group.logits.axis, _first_rows_moved(held.steps)
    if held.node is not None:
        y: Any = tensor_of(held.node)
        return beside_fact(z, axis, "The labels", y, *_rows_and_classes(held), moved)
    if held.column is not None:
        return None
    return beside_fact(z, axis, "The labels, which are the numbers of the rows,", torch.arange(0), 0, None)


def _outside_fact(group: Group, held: Outside) -> str | None:
    if held.kind == "scalar":
        return None
    z: Any = tensor_of(group.logits.node)
    first, classes = _rows_and_classes(held)
    name = "The weights" if classes is not None else "The numbers of the rows"
    moved = _first_rows_moved(held.steps)
    return beside_fact(z, group.logits.axis, name, example_of(held.node), first, classes, moved)


def _rows_and_classes(held: Label | Outside) -> tuple[int | None, int | None]:
    """The dimensions of a tensor that correspond to the first of the rows and to the classes, if any do."""
    if isinstance(held, Label):
        return int(held.kept == 0), None
    if held.kind == "scalar":
        return None, None
    assert held.node is not None
    assert held.axis is not None
    missing = len(shape_of(held.like)) - len(shape_of(held.node))
    first = {"row": int(held.axis == 0) - missing, "columns": int(held.axis == 0)}.get(held.kind)
    return first, held.axis - missing if held.kind in ("classes", "columns") else None


def _first_rows_moved(steps: tuple[RowView, ...]) -> bool:
    """Whether the first dimension of the rows, over which ranks may share them, does not stay as it is."""
    cut = any(isinstance(s, Slice) and s.left[0] + s.right[0] for s in steps)
    return cut or any(isinstance(s, (Permute, Index)) for s in steps)


def placements_beside(group: Group, held: Label | Outside) -> list[int] | None:
    """Where a DTensor is to be brought, as numbers; None where it lies as the logits do, or has no rows."""
    x, z = example_of(held.node), example_of(group.logits.node)  # type: ignore[arg-type]
    if not is_dtensor(x) or (isinstance(held, Outside) and held.kind == "scalar"):
        return None
    wanted = beside(z, group.logits.axis, x, *_rows_and_classes(held))  # type: ignore[arg-type]
    return None if wanted == list(x.placements) else numbered(wanted)


# What is read of the loss


def _refusal_of_reader(reading: Reading, group: Group, node: Node) -> Refusal | None:
    """A rank's part of a mean of means is another number than its part of the mean.

    NOTE What a partial value is on one rank has no meaning that torch promises, and it changes from release
    to release; but who reads it may count on it, so that loss is left.
    """
    value, example = value_of(reading, node), example_of(node)
    if not isinstance(value, LossValue) or not is_dtensor(example):
        return None
    z: Any = example_of(group.logits.node)
    if read_as_ours(example, value.reduction.how, z, group.logits.axis):
        return None
    reader = _local_reader(node)
    if reader is None:
        return None
    fact = f"The loss is {described(example)}, of which {{culprit}} reads the part of one rank."
    return Refusal(Reason.LOCAL_PART, fact, reader)


def _local_reader(node: Node) -> Node | None:
    """Who reads a rank's part of a value of which each rank has a part, or of one that is made of it."""
    seen, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            if reads_local(user):
                return user
            example = tensor_of(user)
            partial = is_dtensor(example) and any(p.is_partial() for p in example.placements)
            if partial and user not in seen:
                seen.add(user)
                stack.append(user)
    return None
