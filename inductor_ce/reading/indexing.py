"""Steps that compute nothing: views, casts, copies, detachment, and the choice of rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from .. import algebra
from ..common.findings import Reason, Refusal
from ..graph.shapes import same_shape, shape_of, tensor_of
from .chosen import chosen_by_index
from .context import Context, is_labels
from .picks import fixed_pick, picked_by_index, take
from .row_views import index_per_dimension, index_steps, row_shape
from .steps import View
from .values import Columns, Outcome, RowValue, Value, VocabValue, detached
from .views import HALF, step_back, viewed, viewing


def view(context: Context, args: dict[str, Any]) -> Outcome:
    """A view, a cast or a copy: the same value, with its rows, or its classes, where they are then."""
    source = args.get("input")
    value = context.known(source)
    if value is None or not isinstance(source, Node):
        return None
    if isinstance(value, VocabValue) and _is_rounding(context.node, source):
        after = (*value.after, tensor_of(context.node).dtype)  # type: ignore[union-attr]
        return replace(value, after=after, wide=value.wide | {context.node})
    if isinstance(value, Columns):
        return _view_of_columns(context, source, value)
    if viewed(context.node) is not source:
        return None
    if isinstance(value, RowValue):
        if value.is_of_several:
            return value if same_shape(shape_of(context.node), shape_of(source)) else None
        return None if context.is_edited_view(source) else _view_of_rows(context.node, source, value)
    if not isinstance(value, VocabValue):
        return None
    for axis in range(len(shape_of(context.node))):
        back = step_back(context.node, source, axis)
        if back is not None and back[0] == value.axis:
            moved = replace(value, axis=axis, steps=value.steps + back[1])
            return replace(moved, wide=value.wide | {context.node})
    return Refusal(Reason.NOT_UNDERSTOOD, "No dimension of its result holds the classes of one row.")


def _is_rounding(node: Node, source: Node) -> bool:
    """Whether log-probabilities are cast down before they are picked, to be picked as they were rounded."""
    a, b = tensor_of(source), tensor_of(node)
    if a is None or b is None or a.device != b.device or viewing(node) is not View.SAME:
        return False
    return a.dtype == torch.float32 and b.dtype in HALF


def _view_of_rows(node: Node, source: Node, value: RowValue) -> RowValue | None:
    """Casts, and views that only drop or add the axis where the vocabulary was."""
    rows, result = row_shape(source, value.kept), shape_of(node)
    if same_shape(rows, result):
        return replace(value, kept=None)
    for axis in reversed(range(len(result))):
        if len(result) == len(rows) + 1 and result[axis] == 1 and same_shape(rows, row_shape(node, axis)):
            return replace(value, kept=axis)
    return None


def _view_of_columns(context: Context, source: Node, value: Columns) -> Columns | None:
    """Casts, and views that leave the rows in their order. A cast to bool must find but 0 and 1."""
    a, b = tensor_of(source), tensor_of(context.node)
    if a is None or b is None or (b.dtype == torch.bool and a.dtype != torch.bool and not _is_mask(value)):
        return None
    if not b.is_floating_point() and a.is_floating_point() and not _is_mask(value):
        return None
    if same_shape(a.shape, b.shape) and viewing(context.node) is View.SAME:
        return value
    if value.axis is None:
        return value
    for axis in range(b.dim()):
        back = step_back(context.node, source, axis)
        if back is None or back[0] != value.axis:
            continue
        if not back[1] or same_shape(row_shape(source, value.axis), row_shape(context.node, axis)):
            return replace(value, axis=axis)
    return None


def _is_mask(value: Columns) -> bool:
    """Whether a value is 0 or 1 in every column, for one label."""
    squared = algebra.power(value.expr, 2)
    return squared == value.expr


def detach(context: Context, args: dict[str, Any]) -> Value | None:
    source = args.get("input")
    value = context.known(source)
    if value is None or isinstance(value, Columns):
        return None if value is None or context.reading.has_gradient(value) else value
    if not isinstance(value, VocabValue) and context.is_edited_view(source):  # type: ignore[arg-type]
        return None
    return detached(value)


def reorder(context: Context, args: dict[str, Any]) -> Outcome:
    """Transposes move rows about: statistics follow them no further, log-probabilities do."""
    return None if isinstance(context.known(args.get("input")), RowValue) else view(context, args)


def getitem(context: Context, args: dict[str, Any]) -> Outcome:
    """x[index]: labels picked, rows chosen, or a view."""
    source, index = args.get("input"), args.get("index")
    if isinstance(index, tuple) and is_labels(index[-1]):
        return picked_by_index(context, source, index) or chosen_by_index(context, source, index)
    example = tensor_of(source)
    if example is not None and example.dim() == 1 and is_labels(index):
        return take(context, args)
    value = context.known(source)
    if isinstance(value, VocabValue):
        picked = fixed_pick(context, "getitem", args, value) or _chosen_rows(context, source, index, value)
        picked = picked or chosen_by_index(context, source, index)
        if picked is not None:
            return picked
    if isinstance(value, RowValue) and not _only_kept_axis(index, value, len(shape_of(source))):  # type: ignore
        return None
    return view(context, args)


def _only_kept_axis(index: Any, value: RowValue, rank: int) -> bool:
    """Whether x[index] only drops the axis of size 1, as x[..., 0] does, or adds it, as x[..., None] does."""
    if isinstance(index, tuple) and None in index:
        return all(i is None or i is Ellipsis or i == slice(None) for i in index)
    pieces = index_per_dimension(index, rank)
    return pieces is not None and all(
        p == slice(None) or (axis == value.kept and isinstance(p, int)) for axis, p in enumerate(pieces)
    )


def _chosen_rows(context: Context, source: Any, index: Any, value: VocabValue) -> VocabValue | None:
    """x[:, -1] and the like: some rows of log-probabilities that were taken of all."""
    found = index_steps(index, shape_of(source), shape_of(context.node), value.axis)
    if found is None or context.is_edited_view(source):
        return None
    axis, cut, taken = found
    steps = (*value.steps, *(() if cut.is_whole else (cut,)), *taken)
    return replace(value, axis=axis, steps=steps, wide=value.wide | {context.node})


def select(context: Context, args: dict[str, Any]) -> Value | None:
    """x.select(-1, 3); of logits that nobody has normalised yet, see `operands`."""
    source = args.get("input")
    value = context.known(source)
    if not isinstance(value, VocabValue):
        return None
    dim, index = args.get("dim"), args.get("index")
    if isinstance(dim, int) and dim % len(shape_of(source)) != value.axis:  # type: ignore
        chosen = (slice(None),) * (dim % len(shape_of(source)))  # type: ignore[arg-type]
        return _chosen_rows(context, source, (*chosen, index), value)
    return fixed_pick(context, "select", args, value)
