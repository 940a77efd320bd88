"""Steps whose values have the vocabulary axis but are made of labels and numbers alone: targets and masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from .. import algebra
from ..common.findings import Refusal
from ..graph.shapes import constant, equal, same_shape, shape_of, tensor_of
from .context import Context, is_labels
from .picks import label_axis
from .row_views import index_per_dimension, row_shape
from .values import Columns, Outcome, Value

# What reads a step: its node, and its arguments by name.
Function = Callable[[Context, dict[str, Any]], Outcome]


def everywhere(value: Any) -> Columns | None:
    """The same number in every column."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return Columns(algebra.as_vocab(algebra.number(value)), None)


def zeros(context: Context, args: dict[str, Any]) -> Value | None:
    return everywhere(0)


def ones(context: Context, args: dict[str, Any]) -> Value | None:
    return everywhere(1)


def full(context: Context, args: dict[str, Any]) -> Value | None:
    return everywhere(args.get("value"))


def one_hot(context: Context, args: dict[str, Any]) -> Value | None:
    """F.one_hot(y), with the classes behind the dimensions of y."""
    y = args.get("input")
    if not is_labels(y):
        return None
    return Columns(algebra.indicator(context.loose_label(y)), len(shape_of(y)))


def equals(context: Context, args: dict[str, Any]) -> Value | None:
    """arange(V) == y, which is nowhere true for a label that is no class."""
    for classes, y in ((args.get("input"), args.get("other")), (args.get("other"), args.get("input"))):
        count = context.counted(classes)
        if count is not None and is_labels(y) and tensor_of(context.node) is not None:
            shape = shape_of(context.node)
            axis = len(shape) + count[0]
            if equal(shape[axis], count[1]) and _stands_at(y, shape, axis):
                symbol = context.loose_label(y, _kept(y, shape, axis), named=False)
                return Columns(algebra.indicator(symbol), axis)
    return None


def _stands_at(y: Node, shape: tuple[Any, ...], axis: int) -> bool:
    """Whether labels of the shape of the rows broadcast along `axis`."""
    rows = tuple(s for i, s in enumerate(shape) if i != axis)
    own = shape_of(y)
    kept = _kept(y, shape, axis)
    is_known = kept is not None or (axis == 0 and len(own) == len(rows))
    return is_known and same_shape(row_shape(y, kept), rows)


def _kept(y: Node, shape: tuple[Any, ...], axis: int) -> int | None:
    own = shape_of(y)
    return axis if len(own) == len(shape) and equal(own[axis], 1) else None


def differs(context: Context, args: dict[str, Any]) -> Value | None:
    return _complement(equals(context, args))


def negation(context: Context, args: dict[str, Any]) -> Value | None:
    return _complement(mask_of(context, args.get("input")))


def _complement(value: Value | None) -> Columns | None:
    if not isinstance(value, Columns):
        return None
    return Columns(algebra.as_vocab(sympy.Integer(1)) + (-value.expr), value.axis)


def mask_of(context: Context, arg: Any) -> Columns | None:
    """A boolean tensor of indicators."""
    value, example = context.known(arg), tensor_of(arg)
    is_mask = example is not None and example.dtype == torch.bool
    return value if isinstance(value, Columns) and is_mask else None


def scatter(context: Context, args: dict[str, Any]) -> Value | None:
    """One element a row is replaced by a number."""
    base, index, dim = context.known(args.get("input")), args.get("index"), args.get("dim")
    value = _number_of(context, args.get("src", args.get("value")))
    if not isinstance(base, Columns) or value is None or not is_labels(index) or "reduce" in args:
        return None
    if _is_taken_out(base, value):
        return None
    shape = shape_of(args["input"])
    if not isinstance(dim, int) or not -len(shape) <= dim < len(shape):
        return None
    axis = dim % len(shape)
    rows = tuple(1 if i == axis else s for i, s in enumerate(shape))
    if base.axis not in (None, axis) or not same_shape(rows, shape_of(index)):
        return None
    hit = algebra.indicator(context.loose_label(index, axis))
    return Columns(algebra.select(hit, algebra.as_vocab(value), base.expr), axis)


def setitem(context: Context, args: dict[str, Any]) -> Value | None:
    """q[arange, y] = number; q[:, 3] = number."""
    base, index = context.known(args.get("input")), args.get("index")
    value = _number_of(context, args.get("value"))
    if not isinstance(base, Columns) or value is None or not isinstance(index, tuple):
        return None
    if _is_taken_out(base, value):
        return None
    axis, column = _fixed_column(args["input"], index) or (label_axis(context, args["input"], index), None)
    if axis is None or base.axis not in (None, axis):
        return None
    if column is not None:
        y = context.loose_label(None, column=column)
    elif same_shape(row_shape(args["input"], axis), shape_of(index[axis])):
        y = context.loose_label(index[axis], wraps="negative")
    else:
        return None
    return Columns(algebra.select(algebra.indicator(y), algebra.as_vocab(value), base.expr), axis)


def _is_taken_out(base: Columns, value: sympy.Expr) -> bool:
    """Whether a column of what is not 0 elsewhere becomes 0.

    Read so, its logit would be added with all others and taken away again, which leaves nothing of these
    where it is a mask's -1e9. As a tensor that is brought along it has a weight of 0 there.
    """
    return value == 0 and base.expr.get(algebra.ONE) != 0


def _fixed_column(source: Any, index: tuple[Any, ...]) -> tuple[int, int] | None:
    """(axis, column) where `x[index]` is one column of all rows."""
    shape = shape_of(source)
    pieces = index_per_dimension(index, len(shape))
    if pieces is None:
        return None
    fixed = [(axis, piece) for axis, piece in enumerate(pieces) if piece != slice(None)]
    if len(fixed) != 1 or not isinstance(fixed[0][1], int):
        return None
    ((axis, column),) = fixed
    size = constant(shape[axis])
    return (axis, column % size) if size is not None and -size <= column < size else None


def _number_of(context: Context, arg: Any) -> sympy.Expr | None:
    """A number, or a tensor that holds the same one everywhere."""
    value = everywhere(arg) or context.known(arg)
    if not isinstance(value, Columns):
        return None
    number = value.expr.get(algebra.ONE)
    return number if value.expr == algebra.as_vocab(number) else None


def edit(step: Function) -> Function:
    """The step of an operation in place, of labels and numbers.

    Under no_grad a tensor keeps the gradient that it had before the edit, which is none of what it is then.
    """

    def edited(context: Context, args: dict[str, Any]) -> Outcome:
        target = args.get("input")
        example = tensor_of(target)
        if example is not None and example.requires_grad and context.grad_mode is not True:
            return None
        value = step(context, args)
        if not isinstance(value, Columns) or not isinstance(target, Node):
            return value if isinstance(value, Refusal) else None
        if context.grad_mode is not True and context.reading.has_gradient(value):
            return None
        version = context.reading.timeline.version(target, context.position + 1)
        context.reading.edits.setdefault(target, {})[version] = value
        return value

    return edited
