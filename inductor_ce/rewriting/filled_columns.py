"""Columns of logits that are filled with a number, behind the linear layer, as a function of each element.

    z = linear(h, W); z[:, 0] = -1e9  = linear(h, W).masked_fill(arange(V) == 0, -1e9)
    z.index_fill(-1, ids, -inf)       = z.masked_fill(zeros(V).index_fill(0, ids, 1), -inf)

The left sides hide the linear layer from the heads, the right sides are a chain of one step. An edit in place
is one of a copy, where whoever reads the logits afterwards does so by way of the name that is edited.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from ..common.compat.graphs import is_plain_tensor
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import constant, equal, shape_of, tensor_of
from ..graph.timeline import Timeline
from ..reading import spellings
from ..reading.row_views import range_of
from .rewrite import want_gradients_as

# A comparison for each: more columns that are listed one by one are nobody's special tokens.
MAX_LISTED = 16

_INDEX_FILLS = (torch.index_fill, "index_fill")
_INDEX_FILLS_IN_PLACE = ("index_fill_",)


def fill_columns(graph: Graph, node: Node) -> Node:
    """Fill copies where columns of a node are filled, one after another. Returns what stands for the node."""
    if node.target in _INDEX_FILLS and isinstance(node.args[0], Node):
        node = _replaced(graph, node.args[0], node) or node
    made: Node | None = node
    while made is not None:
        made = _filled_copy(graph, made)
    return node


def _filled_copy(graph: Graph, node: Node) -> Node | None:
    """What stands for a node behind the first of its fills; None where there is none, or it has to stay."""
    fills = [user for user in node.users if _edits(user) and user.args[0] is node]
    if not fills:
        return None
    timeline = Timeline(graph)
    fill = min(fills, key=timeline.position.__getitem__)
    first, last = timeline.position[node], timeline.position[fill]
    early = (user for user in node.users if timeline.position[user] < last)
    if not all(map(spellings.reads_shapes, early)) or not _is_only_name(timeline, node, last):
        return None
    if timeline.grad_mode(first) != timeline.grad_mode(last):  # without a gradient, an edit leaves that of z
        return None
    return _replaced(graph, node, fill)


def _edits(node: Node) -> bool:
    return node.target is operator.setitem or node.target in _INDEX_FILLS_IN_PLACE


def _is_only_name(timeline: Timeline, node: Node, until: int) -> bool:
    """Whether the memory of a node is read by way of it alone, from some place on, and is the graph's own."""
    chain = [node]
    while (source := _aliased(timeline, chain[-1])) is not None:
        if not all(user is chain[-1] or spellings.reads_shapes(user) for user in source.users):
            return False
        chain.append(source)
    alike = [each for each in timeline.nodes[:until] if timeline.shares_storage(each, node)]
    return set(alike) == {*chain} and chain[-1].op in ("call_function", "call_method")


def _aliased(timeline: Timeline, node: Node) -> Node | None:
    return next((s for s in node.all_input_nodes if timeline.shares_storage(node, s)), None)


def _replaced(graph: Graph, node: Node, fill: Node) -> Node | None:
    """`node`, some of whose columns a fill gives a number, for all that reads it afterwards."""
    example, given = tensor_of(node), _given(node, fill)
    if example is None or given is None or not is_plain_tensor(example):
        return None
    item, value = given
    if not is_number_of(value, example.dtype):
        return None
    build = Builder(graph, fill, like=node)
    with undone_on_error([build]):
        mask = _mask(build, item, example)
        if mask is None:
            build.undo()
            return None
        result = build("masked_fill", node, mask, value)
    want_gradients_as(node, result)
    if fill.target not in _INDEX_FILLS:
        node.replace_all_uses_with(result, delete_user_cb=lambda user: fill < user)
    fill.replace_all_uses_with(result)
    graph.erase_node(fill)
    return result


def _given(node: Node, fill: Node) -> tuple[Any, Any] | None:
    """(which of the last dimension of a node a fill is for, in all rows, and the number)"""
    rank = len(shape_of(node))
    if fill.kwargs or rank < 2 or len(fill.args) < 3:
        return None
    if fill.target is operator.setitem:
        _, index, value = fill.args
        return None if (item := _last_item(index, rank)) is None else (item, value)
    _, dim, ids, value = fill.args
    return (ids, value) if isinstance(dim, int) and dim % rank == rank - 1 else None


def _last_item(index: Any, rank: int) -> Any:
    """What x[index] asks of the last dimension, where it takes all of the others; else None."""
    items = list(index) if isinstance(index, tuple) else [index]
    if not items or any(item is Ellipsis for item in items[1:]):
        return None
    if items[0] is Ellipsis:
        items[:1] = [slice(None)] * (rank - len(items) + 1)
    *rows, last = items
    whole = all(isinstance(item, slice) and item == slice(None) for item in rows)
    return last if len(items) == rank and whole else None


def is_number_of(value: Any, dtype: torch.dtype) -> bool:
    """Whether a value is a Python number that a dtype has."""
    if not isinstance(value, (int, float)) or not dtype.is_floating_point:
        return False
    return not math.isfinite(value) or abs(value) <= torch.finfo(dtype).max


def column_mask(build: Builder, index: Any, z: torch.Tensor) -> Node | None:
    """bool [V], true in the columns of x[index], of all rows; None where they are not known."""
    item = _last_item(index, z.dim())
    return None if item is None or z.dim() < 2 else _mask(build, item, z)


def _mask(build: Builder, item: Any, z: torch.Tensor) -> Node | None:
    """bool [V], true in the columns of x[..., item]; None where they are not known."""
    classes = constant(z.shape[-1])
    if classes is None:
        return None
    if isinstance(item, Node):
        return _mask_of(build, item, classes, z.device)
    place = build(torch.arange, classes, device=z.device)
    if isinstance(item, slice):
        return _mask_of_range(build, item, classes, place)
    listed = [item] if isinstance(item, int) else item
    if not isinstance(listed, (tuple, list)) or not 1 <= len(listed) <= MAX_LISTED:
        return None
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in listed):
        return None
    alike = [build(operator.eq, place, i % classes) for i in listed]
    return functools.reduce(lambda a, b: build(torch.logical_or, a, b), alike)


def _mask_of(build: Builder, item: Node, classes: int, device: torch.device) -> Node | None:
    """The same of a tensor of columns, or of truth values."""
    example = tensor_of(item)
    if example is None or example.dim() > 1 or example.is_floating_point() or example.device != device:
        return None
    if example.dtype in (torch.bool, torch.uint8):
        whole = example.dtype == torch.bool and example.dim() and equal(example.shape[0], classes)
        return item if whole else None
    none = build(torch.zeros, classes, dtype=torch.bool, device=device)
    return build(torch.index_fill, none, 0, build("long", build("reshape", item, -1)), True)


def _mask_of_range(build: Builder, item: slice, classes: int, place: Node) -> Node | None:
    bounds = range_of(item, classes)
    if bounds is None:
        return None
    start, stop = bounds
    inside = build(operator.ge, place, start)
    return inside if stop == classes else build(torch.logical_and, inside, build(operator.lt, place, stop))
