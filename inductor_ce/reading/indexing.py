"""Steps that compute nothing: views, casts, copies, detachment, and the choice of elements by a label."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from .. import algebra
from ..common.findings import Reason, Refusal
from ..graph.shapes import Size, constant, equal, same_shape, shape_of, tensor_of
from . import diagonals, spellings
from .chosen import chosen_along, chosen_and_picked, chosen_by_index, is_alike, is_mask
from .context import Context, is_labels
from .row_views import Reshape, index_per_dimension, index_steps, row_shape
from .steps import View
from .values import Columns, Outcome, RowValue, Value, VocabValue, detached
from .views import HALF, first_and_step, keeps_order, step_back, viewed, viewing

# A symbol for each label of a row: beyond this one stands for all of them.
MAX_LABELS = 16


def view(context: Context, args: dict[str, Any]) -> Outcome:
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


def diagonal(context: Context, args: dict[str, Any]) -> Value | None:
    """x.diag(), as `select`, and x[:, y].diag()."""
    source = args.get("input")
    value, picked = context.known(source), diagonals.of_picks(context, source)
    if picked is None or not diagonals.is_main(args):
        return fixed_pick(context, "diagonal", args, value) if isinstance(value, VocabValue) else None
    context.reading.looked_through.add(source)  # type: ignore[arg-type]
    return _picked(picked[0], [context.label(*picked, wraps="negative")], None)


def fixed_pick(context: Context, step: str, args: dict[str, Any], value: VocabValue) -> RowValue | None:
    """What is taken of all rows where no tensor has the labels: a column, several, or the diagonal."""
    if step == "diagonal":
        return _diagonal(context, args, value)
    rank = len(shape_of(args["input"]))
    if step == "getitem" and diagonals.is_range_twice(args["index"], shape_of(args["input"])):
        return _diagonal(context, args, value)
    if step == "getitem":
        columns = _columns_of(args["index"], value, rank)
        return None if columns is None else _picked_columns(context, value, *columns)
    dim, column = args.get("dim"), args.get("index")
    on_axis = isinstance(dim, int) and isinstance(column, int) and dim % rank == value.axis
    return _picked_columns(context, value, [column], None) if on_axis else None  # type: ignore[list-item]


def _columns_of(index: Any, value: VocabValue, rank: int) -> tuple[list[int], int | None] | None:
    """The columns that x[..., 3] and x[..., [3, 5]] take of all rows, and the axis where they stand."""
    several = next((i for i in (index if isinstance(index, tuple) else ()) if isinstance(i, list)), None)
    plain = tuple(0 if i is several else i for i in index) if several else index
    pieces = index_per_dimension(plain, rank)
    if pieces is None or not isinstance(pieces[value.axis], int):
        return None
    if any(piece != slice(None) for axis, piece in enumerate(pieces) if axis != value.axis):
        return None
    if several is None:
        return [pieces[value.axis]], None
    return (several, value.axis) if all(isinstance(i, int) for i in several) else None


def _picked_columns(
    context: Context, value: VocabValue, columns: list[int], kept: int | None
) -> RowValue | None:
    size = constant(shape_of(value.logits.node)[value.logits.axis])
    if size is None or not 1 <= len(columns) <= MAX_LABELS or not all(-size <= c < size for c in columns):
        return None
    return _picked(value, [context.label(value, None, column=c % size) for c in columns], kept)


def _diagonal(context: Context, args: dict[str, Any], value: VocabValue) -> RowValue | None:
    """Row i picked at i."""
    if not diagonals.is_main(args) or not diagonals.is_of_all_rows(shape_of(args["input"]), value):
        return None
    return _picked(value, [context.label(value, None)], None)


def take_along(context: Context, args: dict[str, Any]) -> Outcome:
    """As gather, but that -1 is the last column, and V the first."""
    return gather(context, args, wraps="modulo")


def index_select(context: Context, args: dict[str, Any]) -> Outcome:
    source, dim, index = args.get("input"), args.get("dim"), args.get("index")
    if tensor_of(source) is not None and len(shape_of(source)) == 1:  # type: ignore[arg-type]
        return take(context, args)
    return chosen_along(context, source, dim, index)


def gather(context: Context, args: dict[str, Any], wraps: str = "") -> Outcome:
    source, index = args.get("input"), args.get("index")
    flat = tensor_of(source) is not None and len(shape_of(source)) == 1  # type: ignore[arg-type]
    if flat and not wraps and (picked := take(context, args)) is not None:
        return picked
    known = context.known(source)
    if isinstance(known, VocabValue) and is_alike(index, known.axis):
        rows = chosen_along(context, args["input"], args.get("dim"), index)
        if rows is not None and same_shape(shape_of(context.node), shape_of(rows.logits.node)):
            return rows
    value = context.vocab(args.get("input"), args.get("dim"))
    if value is None or not is_labels(index):
        return None
    if not context.tied(row_shape(args["input"], value.axis), row_shape(index, value.axis)):
        return Refusal(Reason.NOT_UNDERSTOOD, "Its index has not the rows of the tensor that it picks from.")
    return _picked_of(context, value, index, wraps)


def _picked_of(context: Context, value: VocabValue, index: Node, wraps: str) -> RowValue | Refusal | None:
    """The labels of each row, as many as there are on the axis of the classes."""
    count = constant(shape_of(index)[value.axis])
    if count is None:
        return Refusal(Reason.NOT_UNDERSTOOD, "How many labels it picks in a row is not fixed in the graph.")
    if not count:
        return Refusal(Reason.NOT_UNDERSTOOD, "It picks no labels.")
    if count > MAX_LABELS:
        y = context.label(value, index, kept=value.axis, wraps=wraps, width=count)
        picked = _picked(value, [y], value.axis)
        return None if picked is None else replace(picked, width=count)
    columns = [None] if count == 1 else range(count)
    labels = [context.label(value, index, kept=value.axis, wraps=wraps, column=column) for column in columns]
    return _picked(value, labels, value.axis)


def _picked(value: VocabValue, labels: list[sympy.Symbol], kept: int | None) -> RowValue | None:
    exprs = [algebra.at(value.expr, y) for y in labels]
    if None in exprs:
        return None
    first, *more = exprs
    return RowValue(
        value.logits, value.steps, kept, first, value.wide, value.after, value.detached, tuple(more)
    )


def picked_by_index(context: Context, source: Any, index: tuple[Any, ...]) -> Outcome:
    """x[arange, y], or x[arange[:, None], y]: the label counts from the end where it is negative."""
    if label_axis(context, source, index, behind=1) == len(index) - 1:
        several = context.vocab(source, len(index) - 1)
        if several is not None and same_shape(row_shape(source, several.axis), shape_of(index[-1])[:-1]):
            return _picked_of(context, several, index[-1], "negative")
    axis = label_axis(context, source, index)
    if axis is None:
        value = chosen_and_picked(context, source, index)
        if not isinstance(value, VocabValue):
            return value
        return _picked(value, [context.label(value, index[-1], wraps="negative")], None)
    value = context.vocab(source, axis)
    if value is None or not same_shape(row_shape(source, axis), shape_of(index[axis])):
        return None
    return _picked(value, [context.label(value, index[axis], wraps="negative")], None)


def take(context: Context, args: dict[str, Any]) -> Outcome:
    """z.view(-1)[arange(N) * V + y], one element of each row by its place in all of z [N, V].

    A label that is no class takes from another row, of which these statistics know nothing. Its logit is 0
    here and not NaN, as that of labels out of range is, for users multiply such rows by 0.
    """
    path, index = _unflattened(context, args.get("input")), args.get("index")
    if not path:
        return _of_one_row(context, args.get("input"), index)
    if not isinstance(index, Node) or not context.is_as_made(index):
        return None
    *flat, rows = path
    *sizes, classes = shape_of(rows)
    y = _column_in_row(context, index, math.prod(sizes), classes)
    value = None if y is None else context.vocab(rows, len(sizes))
    if value is not None and len(sizes) > 1:
        value = replace(value, steps=(*value.steps, Reshape(rows, len(sizes), context.node, None)))
    picked = None if value is None else _picked(value, [context.label(value, y, named=False)], None)
    if picked is not None:
        context.reading.looked_through.update(flat)
    return picked


def _unflattened(context: Context, source: Any) -> list[Node]:
    """The flat views or copies that a tensor is, last first, and the [N, V] that they are of; or nothing."""
    nodes = [source] if tensor_of(source) is not None else []
    while nodes and len(shape_of(nodes[-1])) == 1:
        before = viewed(nodes[-1])
        if before is None or not keeps_order(nodes[-1], before) or not context.still_alike(nodes[-1], before):
            return []
        nodes.append(before)
    return nodes if nodes and len(shape_of(nodes[-1])) > 1 else []


def _of_one_row(context: Context, source: Any, index: Any) -> RowValue | Refusal | None:
    """x[y] of one row of log-probabilities, with one label or several."""
    value = context.known(source)
    if not isinstance(value, VocabValue) or len(shape_of(source)) != 1:
        return None
    if is_mask(index) or not is_labels(index):
        return None
    if not shape_of(index):
        return _picked(value, [context.label(value, index, wraps="negative")], None)
    return _picked_of(context, value, index, "negative") if len(shape_of(index)) == 1 else None


def _column_in_row(context: Context, index: Node, count: Size, classes: Size) -> Node | None:
    """The labels that `index` adds to the places where the rows begin, if they read the same still."""
    spelled, timeline = spellings.read(index), context.reading.timeline
    if spelled is None or spelled[0].name != "add" or "alpha" in spelled[1]:
        return None
    pair = spelled[1].get("input"), spelled[1].get("other")
    for begins, y in (pair, pair[::-1]):
        if not is_labels(y) or not is_labels(begins) or not same_shape(shape_of(y), (count,)):
            continue
        if _begins_rows(context, begins, count, classes) and timeline.unchanged(y, index, context.position):
            return y
    return None


def _begins_rows(context: Context, node: Node, count: Size, classes: Size) -> bool:
    """Whether a node is 0, V, 2V, ... for all rows: arange(N) * V, or arange(0, N * V, V)."""
    spelled = spellings.read(node)
    if spelled is None or not same_shape(shape_of(node), (count,)) or not context.is_as_made(node):
        return False
    step, args = spelled
    if step.name == "arange":
        return first_and_step(args) == (0, classes)
    if step.name != "mul":
        return False
    pair = args.get("input"), args.get("other")
    return any(
        isinstance(width, int) and equal(width, classes) and context.counted(rows) is not None
        for rows, width in (pair, pair[::-1])
    )


def label_axis(context: Context, source: Any, index: tuple[Any, ...], behind: int = 0) -> int | None:
    """The axis on which `x[index]` takes an element for each row, or several that stand `behind` the rows."""
    shape = shape_of(source)
    if len(index) != len(shape):
        return None
    counts = [context.counted(i) for i in index]
    free = [axis for axis, count in enumerate(counts) if count is None]
    if not free and len(shape) == 2:
        free = [1]  # x[arange, arange]
    if len(free) != 1:
        return None
    (axis,) = free
    if not is_labels(index[axis]) or is_mask(index[axis]):
        return None
    rows = [i for i in range(len(shape)) if i != axis]
    for place, i in enumerate(rows):
        dim, length = counts[i]  # type: ignore[misc]
        if dim != place - len(rows) - behind or not context.tied((length,), (shape[i],)):
            return None
    return axis
