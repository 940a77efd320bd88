"""Rows that were taken piece by piece, by a loop over the first dimension or its chunks, and put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
from torch.fx import Node

from .. import algebra
from ..algebra import symbols
from ..graph.shapes import constant, equal, same_shape, shape_of, tensor_of
from . import spellings
from .context import Context
from .row_views import arrangement, row_shape
from .values import Label, LossValue, RowValue, Value
from .views import keeps_order, viewed

# (the whole, where a piece begins along its first dimension)
Piece = tuple[Node, int]


def stack(context: Context, args: dict[str, Any]) -> Value | None:
    """torch.stack([f(row) for row in z])"""
    return _put_together(context, args, [_row_of(t) for t in _origins(context, args)])


def cat(context: Context, args: dict[str, Any]) -> Value | None:
    """torch.cat([f(chunk) for chunk in z.split(n)])"""
    return _put_together(context, args, [_chunk_of(t) for t in _origins(context, args)])


def _origins(context: Context, args: dict[str, Any]) -> list[Node | None]:
    """For each tensor that is put together, the logits that it is of."""
    tensors = args.get("tensors")
    if not isinstance(tensors, Sequence) or args.get("dim", 0) != 0:
        return []
    values = [context.known(t) for t in tensors]
    return [v.logits.node if _is_a_number_a_row(v) else None for v in values]  # type: ignore[union-attr]


def _is_a_number_a_row(value: Value | None) -> bool:
    if isinstance(value, LossValue):
        return value.reduction.how == "none" and value.reduction.weight is None
    return isinstance(value, RowValue) and value.kept is None


def _put_together(context: Context, args: dict[str, Any], pieces: list[Piece | None]) -> Value | None:
    whole = _whole(pieces, args["tensors"] if pieces else ())
    if whole is None:
        return None
    values: list[RowValue | LossValue] = [context.known(t) for t in args["tensors"]]  # type: ignore[misc]
    first = values[0]
    axis = first.logits.axis + (1 if spellings.is_step(context.node, "stack") else 0)
    version = context.reading.timeline.version(whole, context.position)
    if axis == 0 or not same_shape(row_shape(whole, axis), shape_of(context.node)):
        return None
    if not all(_alike(value, first, version) for value in values):
        return None
    frame = context.vocab(whole, axis)
    if frame is None or frame.expr != algebra.LOGITS or frame.logits.inference != first.logits.inference:
        return None
    for y in _labels_of(first):
        labels = [context.reading.labels[value.logits][y] for value in values]
        base = _whole_labels(context, labels, [piece[1] for piece in pieces if piece is not None])
        if base is None or not same_shape(shape_of(base), shape_of(context.node)):
            return None
        if context.label(frame, base, named=bool(y.is_nonnegative), wraps=labels[0].wraps) != y:
            return None
    wide = frozenset().union(*(value.wide for value in values))
    context.reading.joined.add(context.node)
    detached = first.detached or frame.detached
    return replace(first, logits=frame.logits, steps=frame.steps, wide=wide | frame.wide, detached=detached)


def _alike(value: RowValue | LossValue, first: RowValue | LossValue, version: int) -> bool:
    plain = not arrangement(value.steps) and not value.after and len(_exprs(value)) == 1
    as_first = _facts(value) == _facts(first) and value.logits.version == version
    return plain and as_first and not _has_outside(value)


def _facts(value: RowValue | LossValue) -> tuple[Any, ...]:
    reduction = value.reduction if isinstance(value, LossValue) else None
    return reduction, value.expr, value.detached, value.logits.axis


def _labels_of(value: RowValue | LossValue) -> list[sympy.Symbol]:
    """The labels of an expression, and those by which rows are ignored."""
    ignoring = [value.reduction.y] if isinstance(value, LossValue) and value.reduction.y is not None else []
    return list(dict.fromkeys([*algebra.labels_of(value.expr), *ignoring]))


def _exprs(value: RowValue | LossValue) -> tuple[Any, ...]:
    return value.exprs if isinstance(value, RowValue) else (value.expr,)


def _has_outside(value: RowValue | LossValue) -> bool:
    known = {algebra.V, *(statistic.symbol for statistic in symbols.STATISTICS)}
    return bool(value.expr.free_symbols - known - set(algebra.labels_of(value.expr)))


def _whole_labels(context: Context, labels: list[Label], starts: list[int]) -> Node | None:
    pieces = [_piece_of(label.node) if label.node is not None else None for label in labels]
    timeline = context.reading.timeline
    wholes = {piece[0] for piece in pieces if piece is not None}
    if None in pieces or len(wholes) != 1 or [p[1] for p in pieces if p is not None] != starts:
        return None
    (whole,) = wholes
    still = all(timeline.unchanged(whole, label.position, context.position) for label in labels)
    plain = all(not arrangement(label.steps) and label.column is None for label in labels)
    return whole if still and plain else None


def _piece_of(node: Node) -> Piece | None:
    """The piece that labels are, or are a reshape of."""
    piece = _row_of(node) or _chunk_of(node)
    source = viewed(node)
    while piece is None and source is not None and keeps_order(node, source):
        piece = _row_of(source) or _chunk_of(source)
        node, source = source, viewed(source)
    return piece


def _whole(pieces: list[Piece | None], tensors: Sequence[Node]) -> Node | None:
    """What the pieces make up, each once and in order."""
    wholes = {piece[0] if piece is not None else None for piece in pieces}
    if len(wholes) != 1 or None in wholes:
        return None
    (whole,) = wholes
    position = 0
    for piece, tensor in zip(pieces, tensors, strict=True):
        if piece is None or piece[1] != position:
            return None
        stacked = len(shape_of(tensor)) < len(shape_of(whole)) - 1  # type: ignore[arg-type]
        length = 1 if stacked else constant(shape_of(tensor)[0])
        if length is None:
            return None
        position += length
    return whole if equal(position, shape_of(whole)[0]) else None  # type: ignore[arg-type]


def _row_of(node: Node | None) -> Piece | None:
    """(x, i) where a node is x[i]."""
    spelled = None if node is None else spellings.read(node)
    if spelled is None or not isinstance(spelled[1].get("input"), Node):
        return None
    step, args = spelled
    source, index = args["input"], args.get("index")
    if step.name == "select" and args.get("dim") == 0 and isinstance(index, int) and index >= 0:
        return source, index
    if step.name == "getitem" and isinstance(index, int) and index >= 0:
        inner = spellings.read(source)
        if inner is not None and inner[0].name == "unbind":
            return (inner[1]["input"], index) if inner[1].get("dim", 0) == 0 else None
        return (source, index) if tensor_of(source) is not None else None
    return None


def _chunk_of(node: Node | None) -> Piece | None:
    """(x, start) where a node is x[start:end], or one of the pieces of x."""
    spelled = None if node is None else spellings.read(node)
    if spelled is None or spelled[0].name != "getitem":
        return None
    source, index = spelled[1].get("input"), spelled[1].get("index")
    if isinstance(index, tuple) and index and all(i == slice(None) for i in index[1:]):
        index = index[0]
    if not isinstance(source, Node):
        return None
    if isinstance(index, slice) and index.step in (None, 1) and isinstance(index.start, (int, type(None))):
        start = index.start or 0
        return (source, start) if tensor_of(source) is not None and start >= 0 else None
    return _part_of(source, index) if isinstance(index, int) else None


def _part_of(parts: Node, index: int) -> Piece | None:
    """(x, start) of one of the tensors that split and chunk return."""
    spelled = spellings.read(parts)
    if spelled is None or spelled[0].name not in ("split", "chunk") or spelled[1].get("dim", 0) != 0:
        return None
    lengths = [constant(part.shape[0]) for part in parts.meta["example_value"][:index]]
    return None if None in lengths else (spelled[1]["input"], sum(lengths))  # type: ignore[arg-type]
