"""Padded vocabularies: columns that are cut off logits behind the linear layer, or filled.

    linear(h, W)[..., :V]  = linear(h, W[:V])

The left side hides the linear layer from the heads, the right side is a head with fewer classes. The gradient
of the rows of W that are cut off is 0, exactly. Only logits of which statistics are taken are looked at, and
only where nothing else has those that are cut off. What is filled is in `filled_columns`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import equal, shape_of
from ..graph.timeline import Timeline
from ..reading import spellings
from .filled_columns import fill_columns
from .find_recipe import is_elementwise, is_of_each, is_sized_view, with_width
from .linear_layers import LinearLayer, plain_layer
from .padding import classes_of, columns_kept, items_of
from .rewrite import want_gradients_as


def unpad(graph: Graph) -> None:
    """Move what pads the logits of `row_stats` to where heads are found with it."""
    for stats in graph.find_nodes(op="call_function", target=ops.ROW_STATS):
        node = stats.args[0] if _has_layer(stats.args[0]) else None
        while isinstance(node, Node):
            node = fill_columns(graph, node)
            if _cut_weight(graph, node):
                break
            node = _wide_source(node)


def _has_layer(node: Any) -> bool:
    """Whether logits are made by a linear layer."""
    while isinstance(node, Node) and plain_layer(node) is None:
        node = _wide_source(node) if columns_kept(node) is None else node.args[0]
    return isinstance(node, Node)


def _wide_source(node: Node) -> Node | None:
    """The one source with rows of as many classes."""
    wide = [a for a in node.all_input_nodes if classes_of(a) and classes_of(a) == classes_of(node)]
    return wide[0] if len(wide) == 1 else None


# Columns that are cut off


def _cut_weight(graph: Graph, node: Node) -> bool:
    """Cut the weight instead where a node cuts a linear layer's columns. Returns whether it did."""
    kept = columns_kept(node)
    if kept is None:
        return False
    between: list[Node] = []
    source: Any = node.args[0]
    while (layer := plain_layer(source)) is None:
        if not _is_of_each(source):
            return False
        between.append(source)
        (source,) = source.all_input_nodes
    chain = [source, *between]
    if any(len(each.users) > 1 for each in chain) or not _is_as_made(graph, [*chain, node]):
        return False
    builds = [Builder(graph, place, like=place) for place in (source, node)]
    with undone_on_error(builds):
        made = _layer_of(builds[0], layer, kept)
        result = _repeated(builds[1], made, between, node)
    want_gradients_as(node, result)
    node.replace_all_uses_with(result)
    for each in (node, *between, source):
        graph.erase_node(each)
    return True


def _is_as_made(graph: Graph, nodes: list[Node]) -> bool:
    """Whether nothing writes to what these nodes make, and modes are the same for all of them."""
    timeline = Timeline(graph)
    modes = {timeline.grad_mode(node) for node in nodes}
    unchanged = all(timeline.unchanged(node, node) for node in nodes)
    return len(modes) == 1 and unchanged and _is_in_one_region(timeline, nodes)


def _is_in_one_region(timeline: Timeline, nodes: list[Node]) -> bool:
    """Whether autocast is for all arithmetic of a chain what it is for the last of its nodes."""
    spelled = ((node, spellings.read(node)) for node in nodes)
    computed = [node for node, as_step in spelled if as_step is not None and is_elementwise(as_step[0])]
    *_, last = (timeline.position[node] for node in nodes)
    return all(timeline.same_autocast(node, last) for node in computed)


def _is_of_each(node: Node) -> bool:
    """Whether a node has a function of each element of its source alone, in its order, classes last."""
    spelled = spellings.read(node)
    if spelled is None or len(node.all_input_nodes) != 1:
        return False
    source = node.all_input_nodes[0]
    same_classes = classes_of(node) is not None and classes_of(node) == classes_of(source)
    return same_classes and (is_sized_view(node) or is_of_each(spelled[0]))


def _layer_of(build: Builder, layer: LinearLayer, kept: slice) -> Node:
    """The linear layer, for the classes that are kept."""
    hidden, *others = layer.args
    if layer.target is torch.nn.functional.linear:
        weight, bias = others
        return build(layer.target, hidden, _cut(build, weight, kept), _cut(build, bias, kept))
    if layer.target is torch.addmm:
        bias, hidden, columns = layer.args
        return build(layer.target, _cut(build, bias, kept), hidden, _cut(build, columns, (slice(None), kept)))
    return build(layer.target, hidden, _cut(build, others[0], (slice(None), kept)))


def _cut(build: Builder, operand: Any, index: Any) -> Any:
    return operand if operand is None else build(operator.getitem, operand, index)


def _repeated(build: Builder, made: Node, between: list[Node], cut: Node) -> Node:
    """What was done between the linear layer and the cut, and the cut of rows, if it is one too."""
    kept = classes_of(cut)
    for node in reversed(between):
        if is_sized_view(node):
            sizes = with_width(tuple(node.args[1:]), classes_of(node), kept)
            made = build(node.target, made, *sizes, **node.kwargs)
        else:
            made = build.again(node, made)
    if all(equal(a, b) for a, b in zip(shape_of(made), shape_of(cut), strict=True)):
        return made
    *rows, _ = items_of(cut)
    return build(operator.getitem, made, (*rows, slice(None)))
