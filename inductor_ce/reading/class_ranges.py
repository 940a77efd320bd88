"""Ranges of the classes of log-probabilities: their sum is that over all classes, of what is 0 in the others.

The range is a mask of the classes, which is added to the graph beside the sum, and taken out again where
nobody comes to use it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from .. import algebra
from ..common.compat.graphs import is_plain_tensor
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import constant, example_of, hint, shape_of, tensor_of
from ..graph.timeline import INFERENCE
from . import spellings
from .context import Context
from .left_out import is_normalised
from .row_views import index_per_dimension, range_of
from .values import VocabValue


def of_range(context: Context, arg: Any, how: str) -> VocabValue | None:
    """What has over all classes the "sum" or "mean" that `arg` has, a range of those of log-probabilities.

    None where `arg` is no such range.
    """
    found = _range(context, arg)
    if found is None:
        return None
    value, source, (start, stop) = found
    mask = _mask(context, value, source, start, stop)
    if mask is None:
        return None
    kept = algebra.kept(value.expr, algebra.Vocab.of({algebra.Monomial(q=(mask,)): sympy.Integer(1)}))
    if kept is None or kept.degree > algebra.MAX_DEGREE:
        return None
    if how == "mean":
        kept = kept * (algebra.V / (stop - start))
    context.reading.looked_through.add(arg)
    return replace(value, expr=kept, wide=value.wide | {arg})


def _range(context: Context, arg: Any) -> tuple[VocabValue, Node, tuple[int, int]] | None:
    """(the value of all classes, the node that has it, the first class and the one behind the last)"""
    spelled = spellings.read(arg) if isinstance(arg, Node) else None
    if spelled is None or spelled[0].name not in ("getitem", "narrow") or context.known(arg) is not None:
        return None
    there, source = Context(context.reading, arg), spelled[1].get("input")
    value = there.known(source)
    if not isinstance(value, VocabValue) or not isinstance(source, Node) or not context.is_as_made(arg):
        return None
    if value.after or not is_normalised(value.expr) or tensor_of(arg) is None:
        return None
    if (there.grad_mode == INFERENCE) != (context.grad_mode == INFERENCE):
        return None
    index = spelled[1]["index"] if spelled[0].name == "getitem" else _narrowed(source, spelled[1])
    bounds = _bounds(index, shape_of(source), value.axis)
    z = tensor_of(value.logits.node)
    if bounds is None or z is None or not is_plain_tensor(z):
        return None
    return value, source, bounds


def _narrowed(source: Node, args: dict[str, Any]) -> Any:
    """The index that `x.narrow(dim, start, length)` is."""
    dim, start, length = args["dim"], args["start"], args["length"]
    if not all(isinstance(x, int) for x in (dim, start, length)) or start < 0:
        return None
    return (*[slice(None)] * (dim % len(shape_of(source))), slice(start, start + length))


def _bounds(index: Any, shape: tuple[Any, ...], axis: int) -> tuple[int, int] | None:
    """(first, behind the last) of the classes that x[index] takes, where it takes them of all rows."""
    pieces, size = index_per_dimension(index, len(shape)), hint(shape[axis])  # which a fused loss settles
    if pieces is None or any(piece != slice(None) for i, piece in enumerate(pieces) if i != axis):
        return None
    bounds = range_of(pieces[axis], size)
    return bounds if bounds is not None and bounds[0] < bounds[1] else None


def _mask(context: Context, value: VocabValue, source: Node, start: int, stop: int) -> sympy.Symbol | None:
    """The symbol of a mask that keeps a range of the classes."""
    axis, kind = value.axis, (len(shape_of(source)) - 1 - value.axis, start, stop, example_of(source).device)

    def made(build: Builder) -> Node:
        place = places(build, source, axis)
        mask = build(operator.lt, place, stop)
        return build(torch.logical_and, build(operator.ge, place, start), mask) if start else mask

    mask = added(context, ("classes", str(shape_of(source)[axis]), *kind), made)
    return context.mask(mask, value, source, "where")


def places(build: Builder, source: Node, axis: int) -> Node:
    """The numbers of the classes, which broadcast along a dimension of `source`."""
    number, behind = constant(shape_of(source)[axis]), len(shape_of(source)) - 1 - axis
    classes = build("size", source, axis) if number is None else number
    place = build(torch.arange, classes, device=example_of(source).device)
    return build("reshape", place, -1, *[1] * behind) if behind else place


def added(context: Context, kind: Hashable, make: Callable[[Builder], Node]) -> Node:
    """A mask that is added to the graph beside a step, one node for all of a kind."""
    reading, node = context.reading, context.node
    known = reading.chosen.setdefault(kind, [])
    if not known:
        build = Builder(node.graph, node, like=node)
        with undone_on_error([build]):
            mask = make(build)
        context.add(build)
        known.append(mask)
    return known[0]
