"""Rows chosen after: log_softmax(z)[rows] reads as log_softmax(z[rows]).

Choosing rows commutes with all that is done to each row by itself, so what is chosen of log-probabilities is
read as being of logits of its own: z[rows], which is added to the graph beside the user's node. Statistics
are taken of no other rows then, and one row may be chosen twice, with two labels. What nobody comes to use
is taken out of the graph again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from .. import algebra
from ..algebra.symbols import STATISTICS
from ..common.compat.graphs import is_plain_tensor
from ..common.findings import Reason, Refusal
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import Size, constant, equal, example_of, hint, same_shape, shape_of, tensor_of
from . import spellings
from .context import Context, is_labels
from .row_views import Index, Permute, Reshape, RowView, Slice, arrangement, follow_axis, row_shape
from .steps import View
from .values import Logits, Reading, VocabValue

_OF_A_ROW = {algebra.V, *(s.symbol for s in STATISTICS)}


def chosen_by_index(
    context: Context, source: Any, index: Any, value: VocabValue | None = None
) -> VocabValue | None:
    """x[rows], x[mask], x[arange, rows] and x[:, ::2], with the vocabulary on the last dimension.

    The source is of a value that is known, or that is given.
    """
    value = _choosable(context, source, value)
    rank = len(shape_of(source)) if isinstance(source, Node) else 0
    if value is None or value.axis != rank - 1 or not leaves_last(index, rank):
        return None
    if context.is_edited_view(source):
        return None
    return _chosen(context, source, value, len(shape_of(context.node)) - 1)


def chosen_and_picked(context: Context, source: Any, index: tuple[Any, ...]) -> VocabValue | Refusal | None:
    """What x[rows, y] takes its labels from: x[rows]."""
    value, (*rows, y) = _choosable(context, source), index
    if value is None or value.axis != len(index) - 1 or len(shape_of(source)) != len(index):
        return None
    if not all(is_labels(i) and not is_mask(i) for i in index):
        return None
    if _are_more(shape_of(y), value, source):
        fact = "It picks more elements than there are rows, one of which would be read for each."
        return Refusal(Reason.NOT_UNDERSTOOD, fact)
    chosen = tuple(rows) if len(rows) > 1 else rows[0]

    def choose(build: Builder, z: Node) -> Node:
        return build(operator.getitem, z, chosen)

    found = _made(context, source, value, len(shape_of(y)), choose, ("getitem", repr(chosen)))
    rows_of_z = row_shape(found.logits.node, found.axis)
    return found if same_shape(rows_of_z, shape_of(y)) else None


def chosen_along(
    context: Context, source: Any, dim: Any, index: Any, value: VocabValue | None = None
) -> VocabValue | None:
    """x.index_select(dim, rows), or x.gather(dim, rows) where it takes the same row for all classes."""
    value = _choosable(context, source, value)
    if value is None or not isinstance(dim, int) or not isinstance(index, Node):
        return None
    if dim % len(shape_of(source)) == value.axis or not is_labels(index):
        return None
    return _chosen(context, source, value, value.axis)


def is_alike(index: Any, axis: int) -> bool:
    """Whether an index holds the same number all along an axis, to which it was expanded."""
    if not isinstance(index, Node) or equal(shape_of(index)[axis], 1):
        return isinstance(index, Node)
    spelled = spellings.read(index)
    source = None if spelled is None else spelled[1].get("input")
    if spelled is None or tensor_of(source) is None:
        return False
    before = shape_of(source)  # type: ignore[arg-type]
    if spelled[0].name == "expand":
        place = axis - len(shape_of(index)) + len(before)
        return place < 0 or is_alike(source, place)
    if spelled[0].view is View.RESHAPE:
        back = follow_axis(shape_of(index), axis, before)
        return back is not None and is_alike(source, back)
    return spelled[0].view is View.SAME and is_alike(source, axis)


def _choosable(context: Context, source: Any, given: VocabValue | None = None) -> VocabValue | None:
    """The value of log-probabilities of which rows may be chosen, as they read here."""
    value, timeline = given or context.known(source), context.reading.timeline
    if not isinstance(value, VocabValue) or value.after:
        return None
    z = value.logits.node
    as_read = timeline.version(z, context.position) == value.logits.version
    of_rows = all(not b.q and not b.at for b, _ in value.expr.terms) and value.expr.symbols <= _OF_A_ROW
    plain = is_plain_tensor(tensor_of(z)) and tensor_of(context.node) is not None  # type: ignore[arg-type]
    return value if as_read and of_rows and plain else None


def leaves_last(index: Any, rank: int) -> bool:
    """Whether an index chooses rows by tensors or in steps, and takes all of the last dimension."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(item is None or isinstance(item, bool) for item in items) or not any(map(_picks_out, items)):
        return False
    taken = sum(map(_dimensions, items))
    if Ellipsis in [i for i in items if not isinstance(i, Node)]:
        last = items[-1]
        return last is Ellipsis or (isinstance(last, slice) and last == slice(None))
    whole = isinstance(items[-1], slice) and items[-1] == slice(None)
    return taken < rank or (taken == rank and whole)


def _picks_out(item: Any) -> bool:
    """Whether an item of an index is more than one number, or a range without gaps."""
    step = item.step if isinstance(item, slice) else None
    return isinstance(item, (Node, list, tuple, range)) or step not in (None, 1)


def _dimensions(item: Any) -> int:
    """How many dimensions an item of an index is for."""
    return len(shape_of(item)) if is_mask(item) else int(item is not Ellipsis)


def is_mask(item: Any) -> bool:
    """Whether an item of an index is a tensor of truth values."""
    example = tensor_of(item)
    return example is not None and example.dtype in (torch.bool, torch.uint8)


def _chosen(context: Context, source: Node, value: VocabValue, axis: int) -> VocabValue | None:
    """The value of a node that chooses rows of `source`."""
    node = context.node

    def choose(build: Builder, z: Node) -> Node:
        return build.sized_as(build.again(node, {n: n for n in node.all_input_nodes} | {source: z}), node)

    key = str(node.target), repr(node.args[1:]), repr(node.kwargs)
    return _made(context, source, value, axis, choose, key)


def _made(
    context: Context,
    source: Node,
    value: VocabValue,
    axis: int,
    choose: Callable[[Builder, Node], Node],
    key: tuple[str, ...],
) -> VocabValue:
    """The value over logits of which `choose` takes rows, those that are there already if they are alike."""
    reading, node = context.reading, context.node
    whole = value.logits, arrangement(value.steps), str(shape_of(source)), value.axis, *key
    z = next((z for z in reading.chosen.get(whole, []) if _reads_alike(context, z)), None)
    if z is None:
        build = Builder(node.graph, node, like=node)
        with undone_on_error([build]):
            z = choose(build, _arranged(build, value, source))
        wanted = context.grad_mode is True and example_of(value.logits.node).requires_grad
        build.tell_gradients(wanted)
        context.add(build)
        reading.chosen.setdefault(whole, []).append(z)
    logits = Logits(z, axis, reading.timeline.version(z, context.position), value.logits.inference)
    return replace(value, logits=logits, steps=(), axis=axis, wide=value.wide | {node})


def _are_more(picked: tuple[Size, ...], value: VocabValue, source: Node) -> bool:
    """Whether more elements are picked than there are rows: each would be a row to be swept."""
    return math.prod(map(hint, picked)) > math.prod(map(hint, row_shape(source, value.axis)))


def _reads_alike(context: Context, z: Node) -> bool:
    """Whether rows that were chosen before are those that would be chosen here, with the same gradient."""
    reading, timeline = context.reading, context.reading.timeline
    then = timeline.position[reading.added[z]]
    read = [n for n in z.all_input_nodes if n not in reading.added]
    unchanged = all(timeline.version(n, then) == timeline.version(n, context.position) for n in read)
    return unchanged and timeline.grad_mode(then) == context.grad_mode


def _arranged(build: Builder, value: VocabValue, source: Node) -> Node:
    """The logits, with rows and classes where `source` has them."""
    z, axis = value.logits.node, value.logits.axis
    steps = value.steps if arrangement(value.steps) else ()
    if axis == value.axis and not steps and same_shape(shape_of(z), shape_of(source)):
        return z
    if axis != len(shape_of(z)) - 1:
        z = build(torch.movedim, z, axis, -1)
    for step in steps or [Reshape(z, axis, source, value.axis)]:
        z = _stepped(build, z, step)
    return z if value.axis == len(shape_of(z)) - 1 else build(torch.movedim, z, -1, value.axis)


def _stepped(build: Builder, z: Node, step: RowView) -> Node:
    """What a step makes of the rows of logits, whose classes are on the last dimension."""
    if isinstance(step, Permute):
        return build("permute", z, [*step.order, len(step.order)])
    if isinstance(step, Index):
        return build("select", z, step.dim, step.at)
    if isinstance(step, Slice):
        cuts = zip(step.left, step.right, strict=True)
        return build(operator.getitem, z, (*(slice(a or None, -b or None) for a, b in cuts), ...))
    rows, number = row_shape(step.result, step.result_axis), constant(shape_of(z)[-1])
    classes = build("size", z, -1) if number is None else number
    sizes = [constant(size) for size in rows]
    if sizes.count(None) < 2:
        return build("reshape", z, *(-1 if size is None else size for size in sizes), classes)
    places = [i for i in range(len(shape_of(step.result))) if i != step.result_axis]
    made = [build("size", step.result, i) if s is None else s for i, s in zip(places, sizes, strict=True)]
    return build("reshape", z, *made, classes)


def forget(reading: Reading) -> None:
    """Take out of the graph what was added to it and is not used."""
    for node in reversed(reading.added):
        if not node.users:
            node.graph.erase_node(node)
