"""Sums, means and the largest of all logits at once, as of those of each row: before losses are read.

    z.mean()          = z.mean(-1).mean()
    z.max()           = z.amax(-1).max()              where no gradient is wanted
    z.isnan().any()   = z.amax(-1).isnan().any()
    z[:n].mean()      = z.mean(-1)[:n].mean()         for n no small part of the rows

The right sides are made of what the sweep of a loss has for each row, and leave the logits to it. On the
left all of them are read, as programs do that log them, or that add `0 * z.sum()` for the sake of a gradient.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from ..common.compat.graphs import is_plain_tensor
from ..graph.builder import Builder
from ..graph.shapes import example_of, hint, shape_of, tensor_of
from ..graph.timeline import Timeline
from ..reading import spellings
from ..reading.row_views import index_per_dimension
from ..reading.sides import piece_of
from ..reading.steps import Step, View
from .find_recipe import is_of_each, is_sized_view
from .linear_layers import logit_classes, plain_layer

_SUMS = ("sum", "mean")
_LARGEST = ("max", "amax")
_ANY, _IS_NAN = ("any", torch.any), ("isnan", torch.isnan)
_MOST_STEPS = 16
_LEAST_SHARE = 4  # all rows are reduced: no fewer than one of so many is to be wanted


class _Reduced(NamedTuple):
    """What is reduced: logits [..., V], or some of their rows.

    Attributes:
        logits: all of them.
        links: the casts and the like between these and the reduction, first to last.
        cuts: what is taken of their rows, by dimensions, first to last.
        between: all nodes between, of which `links` are some.
    """

    logits: Node
    links: tuple[Node, ...]
    cuts: tuple[tuple[Any, ...], ...]
    between: tuple[Node, ...]


def sum_by_rows(graph: Graph, min_vocab: int) -> None:
    """Reduce all logits of a linear layer row by row, in a graph that has a loss."""
    steps = map(spellings.step_of, graph.nodes)
    if not any(step is not None and (step.is_loss or step.normalises) for step in steps):
        return
    found = [(node, of) for node in graph.nodes if (of := _logits_of(node, min_vocab)) is not None]
    if not found:
        return
    timeline = Timeline(graph)
    for node, of in found:
        if _is_of_now(timeline, node, of):
            _reduce(graph, timeline, node, of)


def _logits_of(node: Node, min_vocab: int) -> _Reduced | None:
    """The logits of which a node is a reduction of all, or of all that some rows have, if it is."""
    spelled, between = spellings.read(node), list[Node]()
    source: Any = None
    if spelled is not None and spelled[0].name in (*_SUMS, *_LARGEST):
        given = {name: value for name, value in spelled[1].items() if value is not None and value != ()}
        source = given.pop("input", None)
        if set(given) - {"dtype"} or (spelled[0].name in _LARGEST and tensor_of(node) is None):
            return None
    elif node.target in _ANY and len(node.args) == 1 and not node.kwargs:
        (inner,) = node.args
        if isinstance(inner, Node) and inner.target in _IS_NAN:
            between, source = [inner], inner.args[0]
    while isinstance(source, Node) and is_sized_view(source) and not _is_wide(source, min_vocab):
        between.append(source)
        (source,) = source.args[:1]
    if not isinstance(source, Node) or not _is_wide(source, min_vocab):
        return None
    found = _cut_of(source, between)
    return found if _is_wide(found.logits, min_vocab) and _is_of_layer(found.logits) else None


def _cut_of(source: Node, between: list[Node]) -> _Reduced:
    """What a node is of logits of which rows are cut off; of itself, where it is not known as such."""
    path, links, cuts, node = list[Node](), list[Node](), list[tuple[Any, ...]](), source
    while (step := spellings.step_of(node)) is not None and len(path) < _MOST_STEPS:
        cut = _rows_taken(node)
        if cut is not None:
            cutting = node.all_input_nodes[0]
            path += [node] if tensor_of(cutting) is not None else [node, cutting]
            cuts.insert(0, cut)
        elif _is_same(step) and len(node.all_input_nodes) == 1:
            path.append(node)
            links.insert(0, node)
        else:
            break
        node = path[-1].all_input_nodes[0]
    left, rows = (math.prod(map(hint, shape_of(each)[:-1])) for each in (source, node))
    if not cuts or left * _LEAST_SHARE < rows:
        return _Reduced(source, (), (), tuple(between))
    return _Reduced(node, tuple(links), tuple(cuts), (*between, *path))


def _is_same(step: Step) -> bool:
    return (step.name == "detach" or step.view is View.SAME) and not step.edits


def _rows_taken(node: Node) -> tuple[Any, ...] | None:
    """What a node takes of a tensor's rows [...], with all classes of each; None where it is no such."""
    piece = piece_of(node)
    if piece is not None:
        rank, size = len(shape_of(piece.source)), shape_of(node)[piece.dim]
        own = slice(piece.left, piece.left + size)
        return None if piece.dim == rank - 1 else (*[slice(None)] * piece.dim, own)
    spelled = spellings.read(node)
    source = None if spelled is None else spelled[1].get("input")
    if spelled is None or spelled[0].name != "getitem" or not isinstance(source, Node):
        return None
    if tensor_of(source) is None or node.all_input_nodes != [source]:
        return None
    taken = index_per_dimension(spelled[1]["index"], len(shape_of(source)))
    return tuple(taken[:-1]) if taken is not None and taken[-1] == slice(None) else None


def _is_of_now(timeline: Timeline, node: Node, of: _Reduced) -> bool:
    """Whether a reduction is of what logits are where it is, with the gradient that they have there."""
    places = [timeline.position[each] for each in (*of.between, node)]
    modes = {timeline.grad_mode(place) for place in places}
    return len(modes) == 1 and timeline.unchanged(of.logits, min(places), max(places))


def _is_wide(node: Node, min_vocab: int) -> bool:
    classes = logit_classes(node)
    return classes is not None and classes >= min_vocab and is_plain_tensor(example_of(node))


def _is_of_layer(node: Node) -> bool:
    """Whether a tensor is a function of each element of what a linear layer makes, classes last."""
    while plain_layer(node) is None:
        spelled, sources = spellings.read(node), [a for a in node.all_input_nodes if tensor_of(a) is not None]
        wide = [source for source in sources if len(shape_of(source)) > 1]
        if spelled is None or len(wide) != 1 or shape_of(wide[0])[-1:] != shape_of(node)[-1:]:
            return False
        is_same = (spelled[0].name == "detach" or is_sized_view(node)) and len(sources) == 1
        if not is_same and not is_of_each(spelled[0]):
            return False
        (node,) = wide
    return True


def _reduce(graph: Graph, timeline: Timeline, node: Node, of: _Reduced) -> None:
    spelled, place, build = spellings.read(node), timeline.position[node], Builder(graph, node, like=node)
    is_sum = spelled is not None and spelled[0].name in _SUMS
    dtype = example_of(of.links[-1] if of.links else of.logits).dtype
    asked = (spelled[1].get("dtype") if spelled is not None and is_sum else None) or dtype
    if torch.promote_types(asked, dtype) != asked:  # each logit is rounded first
        return
    if not is_sum and example_of(node).requires_grad:  # of which each that is largest has a share
        return
    logits = of.logits
    for link in of.links:
        logits = build.again(link, logits)
    if spelled is not None and is_sum:
        make = functools.partial(build, "mean" if spelled[0].name == "mean" else "sum")
        rows = make(logits, -1, dtype=torch.promote_types(asked, torch.float32))
        result = make(_taken(build, rows, of))
        if example_of(result).dtype != example_of(node).dtype:
            result = build("to", result, example_of(node).dtype)
    else:
        rows = _taken(build, build("amax", logits, -1), of)
        result = build("max", rows) if spelled is not None else build("any", build("isnan", rows))
    build.tell_gradients(timeline.grad_mode(place) is True)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _taken(build: Builder, rows: Node, of: _Reduced) -> Node:
    for cut in of.cuts:
        rows = build(operator.getitem, rows, cut)
    return rows
