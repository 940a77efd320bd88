"""Rows chosen of a linear layer's result: linear(h, W)[rows] = linear(h[rows], W).

The left side has all logits in memory, and hides the linear layer from the heads; the right side is a head
with fewer rows. Only logits of which statistics are taken are looked at, and only where nothing else has
those that are not chosen. Rows that are cut off are cut off statistics, but before a temperature or the like,
or where a divergence reads what is left: of all sides it has the same rows.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import constant, example_of, shape_of, tensor_of
from ..graph.timeline import Timeline
from ..graph.walk import reached
from ..reading import spellings
from ..reading.chosen import is_alike, leaves_last
from ..reading.row_views import index_per_dimension
from .find_recipe import is_of_each, is_sized_view, with_width
from .linear_layers import LinearLayer, logit_classes, plain_layer
from .rewrite import want_gradients_as


def choose_hidden(graph: Graph) -> None:
    """Choose rows of the hidden states where rows are chosen of the logits of `row_stats`."""
    for stats in graph.find_nodes(op="call_function", target=ops.ROW_STATS):
        while _choose_one(graph, stats.args[0]):  # what was chosen of them may be chosen of now
            pass
    cut_hidden(graph)


def _choose_one(graph: Graph, node: Any) -> bool:
    """Whether rows were chosen of some logits, and are of hidden states now."""
    while isinstance(node, Node):
        chooses = _chooses_rows(node) or _takes_one(node) or cuts_rows(node)
        if chooses and _moved_before(graph, node):
            return True
        node = wide_source(node)
    return False


def cut_hidden(graph: Graph) -> None:
    """Cut rows of the hidden states where rows are cut of the logits of a `divergence`."""
    for divergence in graph.find_nodes(op="call_function", target=ops.DIVERGENCE):
        for node in divergence.args[0]:
            while isinstance(node, Node):
                if cuts_rows(node) and _moved_before(graph, node):
                    break
                node = wide_source(node)


def wide_source(node: Node) -> Node | None:
    """The one source with rows of as many classes."""
    wide = [a for a in node.all_input_nodes if logit_classes(a) and logit_classes(a) == logit_classes(node)]
    return wide[0] if len(wide) == 1 else None


def _spelled(node: Node) -> tuple[str, dict[str, Any], int]:
    """(a step, its arguments, the rank of its source), of a node of which that alone is wide; else blank."""
    spelled, source = spellings.read(node), node.args[0] if node.args else None
    if spelled is None or not isinstance(source, Node) or wide_source(node) is not source:
        return "", {}, 0
    return spelled[0].name, spelled[1], len(shape_of(source))


def _chooses_rows(node: Node) -> bool:
    """Whether a node takes some rows of its source, by tensors or in steps, whole."""
    name, args, rank = _spelled(node)
    if name == "getitem":
        return leaves_last(args["index"], rank)
    dim = args.get("dim")
    if name not in ("index_select", "gather") or not isinstance(dim, int) or dim % rank == rank - 1:
        return False
    return name == "index_select" or is_alike(args["index"], rank - 1)


def _takes_one(node: Node) -> bool:
    """Whether a node takes one place, as x[:, -1] does, of a dimension of rows, and ranges of others."""
    name, args, rank = _spelled(node)
    if name == "select":
        dim, at = args["dim"], args["index"]
        return isinstance(dim, int) and dim % rank < rank - 1 and isinstance(at, int)
    pieces = index_per_dimension(args["index"], rank) if name == "getitem" else None
    return pieces is not None and pieces[-1] == slice(None) and any(isinstance(i, int) for i in pieces)


def cuts_rows(node: Node) -> bool:
    """Whether a node takes ranges of rows of its source, whole, from one number to another."""
    name, args, _ = _spelled(node)
    if name != "getitem":
        return False
    items = args["index"] if isinstance(args["index"], tuple) else (args["index"],)
    numbers = (n for n in node.all_input_nodes if n is not node.args[0])
    return all(map(_is_number, numbers)) and all(i is Ellipsis or isinstance(i, slice) for i in items)


def _is_number(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), (int, torch.SymInt))


def _moved_before(graph: Graph, node: Node) -> bool:
    """Choose the rows before the linear layer. Returns whether that could be done.

    Rows that are cut off are no matter of what is known when they are: the layer stays where it is.
    """
    between: list[Node] = []
    source: Any = node.args[0]
    while (layer := plain_layer(source)) is None:
        if not _is_of_each_row(source):
            return False
        between.append(source)
        source = wide_source(source)
    if any(map(is_sized_view, between)) and constant(shape_of(layer.hidden)[-1]) is None:
        return False
    chain = [source, *between]
    stays = cuts_rows(node) and all(len(n.all_input_nodes) == 1 for n in between)
    stays = stays and _are_known(graph, [n for n in node.all_input_nodes if n is not node.args[0]], source)
    stays = stays and _keeps_gradient(graph, node, source)
    if not _is_alone(graph, chain) or not (stays or _may_move(graph, layer, chain, node)):
        return False
    places = [source, *reversed(between)] if stays else [node] * (1 + len(between))
    builds = [Builder(graph, place, like=place) for place in places]
    with undone_on_error(builds):
        result = _chosen_first(builds, layer, between, node)
    want_gradients_as(node, result)
    node.replace_all_uses_with(result)
    for each in (node, *between, source):
        graph.erase_node(each)
    return True


def _keeps_gradient(graph: Graph, node: Node, place: Node) -> bool:
    """Whether what a node makes has at a place the gradient, or none, that it has where it stands."""
    timeline = Timeline(graph)
    here, there = (timeline.grad_mode(each) for each in (node, place))
    return here is True or here == there


def _are_known(graph: Graph, numbers: list[Node], place: Node) -> bool:
    """Whether numbers are made of what there is at a place."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    later = (n for n in reached(numbers, lambda n: n.all_input_nodes if order[n] > order[place] else []))
    return all(order[n] < order[place] or _is_number(n) for n in later)


def _known(build: Builder, number: Node, made: dict[Node, Node]) -> Node:
    """A number where a builder adds nodes: itself, if it is there, or as it is made of others."""
    if number not in made:
        if build.comes_after(number):
            return number
        made[number] = build.again(number, {n: _known(build, n, made) for n in number.all_input_nodes})
    return made[number]


def _is_of_each_row(node: Node) -> bool:
    """Whether a node does the same to every row, or only arranges rows otherwise."""
    step = spellings.step_of(node)
    of_each = step is not None and is_of_each(step)
    of_each = of_each and all(len(example_of(a).shape) < 2 for a in _beside(node) if tensor_of(a) is not None)
    return wide_source(node) is not None and (is_sized_view(node) or of_each)


def _beside(node: Node) -> list[Node]:
    """What a node reads beside the rows."""
    return [a for a in node.all_input_nodes if a is not wide_source(node)]


def _may_move(graph: Graph, layer: LinearLayer, chain: list[Node], node: Node) -> bool:
    """Whether the layer and what follows may be computed where the rows are chosen, and of no others."""
    timeline = Timeline(graph)
    alike = all(timeline.grad_mode(each) == timeline.grad_mode(node) for each in chain)
    operands = [(a, chain[0]) for a in layer.args if isinstance(a, Node)]
    operands += [(a, each) for each in chain[1:] for a in _beside(each)]
    here = timeline.position[node]
    unchanged = all(timeline.unchanged(a, reader, here) for a, reader in operands)
    return alike and unchanged and timeline.same_autocast(chain[0], node)


def _is_alone(graph: Graph, chain: list[Node]) -> bool:
    """Whether nothing else reads, or changes, what is between a layer and the rows that are chosen."""
    timeline = Timeline(graph)
    return all(len(each.users) == 1 and timeline.unchanged(each, each) for each in chain)


def _chosen_first(builds: list[Builder], layer: LinearLayer, between: list[Node], node: Node) -> Node:
    """The rows of the hidden states, their logits, and what was done to all logits before."""
    build, *others = builds
    classes, width = logit_classes(node), constant(shape_of(layer.hidden)[-1])
    hidden = layer.hidden
    for view in reversed(between):
        if is_sized_view(view):
            sizes = with_width(tuple(view.args[1:]), classes, width)
            hidden = build(view.target, hidden, *sizes, **view.kwargs)
    args = tuple(_chosen(build, node, hidden) if a is layer.hidden else a for a in layer.args)
    made = build(layer.target, *args)
    for build, step in zip(others, reversed(between), strict=True):
        if not is_sized_view(step):
            beside = _beside(step)
            made = build.again(step, {a: a if a in beside else made for a in step.all_input_nodes})
    return build.sized_as(made, node)


def _chosen(build: Builder, node: Node, hidden: Node) -> Node:
    """The rows of the hidden states that a node takes of the logits."""
    (source,) = node.args[:1]
    assert isinstance(source, Node)
    if cuts_rows(node) or _takes_one(node):  # of rows apart, torch may make a product for each sequence
        known: dict[Node, Node] = {source: hidden}
        own = {n: _known(build, n, known) for n in node.all_input_nodes}
        return build("contiguous", build.again(node, own))
    if spellings.is_step(node, "gather"):
        index = spellings.arguments_of(node)["index"]
        rows = build(operator.getitem, index, (..., slice(0, 1)))
        sizes = [-1] * (len(shape_of(index)) - 1) + [shape_of(hidden)[-1]]
        rows = build("expand", rows, *sizes)
        dim = spellings.arguments_of(node)["dim"]
        return build(torch.gather, hidden, dim, rows)
    return build.again(node, {n: n for n in node.all_input_nodes} | {source: hidden})
