"""Steps that choose an element of each row by its label: as tensors, numbers and diagonals have it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import sympy
from torch.fx import Node

from .. import algebra
from ..common.findings import Reason, Refusal
from ..graph.shapes import Size, constant, equal, same_shape, shape_of, tensor_of
from . import diagonals, spellings
from .chosen import chosen_along, chosen_and_picked, is_alike, is_mask
from .context import Context, is_labels
from .row_views import Reshape, index_per_dimension, row_shape
from .values import Outcome, RowValue, Value, VocabValue
from .views import first_and_step, keeps_order, viewed

# A symbol for each label of a row: beyond this one stands for all of them.
MAX_LABELS = 16


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
    return replace(value.reduced_to(first, kept), after=value.after, more=tuple(more))


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
