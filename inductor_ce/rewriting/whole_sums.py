"""Sums, means and the largest of all logits at once, as of those of each row: before losses are read.

    z.mean()          = z.mean(-1).mean()
    z.max()           = z.amax(-1).max()              where no gradient is wanted
    z.isnan().any()   = z.amax(-1).isnan().any()

The right sides are made of what the sweep of a loss has for each row, and leave the logits to it. On the
left all of them are read, as programs do that log them, or that add `0 * z.sum()` for the sake of a gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx import Graph, Node

from ..common.compat.graphs import is_plain_tensor
from ..graph.builder import Builder
from ..graph.shapes import example_of, shape_of, tensor_of
from ..graph.timeline import Timeline
from ..reading import spellings
from .find_recipe import is_of_each, is_sized_view
from .linear_layers import logit_classes, plain_layer

_SUMS = ("sum", "mean")
_LARGEST = ("max", "amax")
_ANY, _IS_NAN = ("any", torch.any), ("isnan", torch.isnan)


def sum_by_rows(graph: Graph, min_vocab: int) -> None:
    """Reduce all logits of a linear layer row by row, in a graph that has a loss."""
    steps = map(spellings.step_of, graph.nodes)
    if not any(step is not None and (step.is_loss or step.normalises) for step in steps):
        return
    found = [(node, of) for node in graph.nodes if (of := _logits_of(node, min_vocab)) is not None]
    if not found:
        return
    timeline = Timeline(graph)
    for node, (logits, between) in found:
        if _is_of_now(timeline, node, logits, between):
            _reduce(graph, timeline, node, logits)


def _logits_of(node: Node, min_vocab: int) -> tuple[Node, list[Node]] | None:
    """The logits [..., V] of which a node is a reduction of all, if it is, and the nodes between."""
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
    is_found = isinstance(source, Node) and _is_wide(source, min_vocab) and _is_of_layer(source)
    return (source, between) if is_found else None


def _is_of_now(timeline: Timeline, node: Node, logits: Node, between: list[Node]) -> bool:
    """Whether a reduction is of what logits are where it is, with the gradient that they have there."""
    places = [timeline.position[each] for each in (*between, node)]
    modes = {timeline.grad_mode(place) for place in places}
    return len(modes) == 1 and timeline.unchanged(logits, min(places), max(places))


def _is_wide(node: Node, min_vocab: int) -> bool:
    classes = logit_classes(node)
    return classes is not None and classes >= min_vocab and is_plain_tensor(example_of(node))


def _is_of_layer(node: Node) -> bool:
    """Whether a tensor is a function of each element of what a linear layer makes, classes last."""
    classes = shape_of(node)[-1]
    while plain_layer(node) is None:
        spelled, sources = spellings.read(node), node.all_input_nodes
        if spelled is None or len(sources) != 1 or shape_of(sources[0])[-1:] != (classes,):
            return False
        if not (spelled[0].name == "detach" or is_sized_view(node) or is_of_each(spelled[0])):
            return False
        node = sources[0]
    return True


def _reduce(graph: Graph, timeline: Timeline, node: Node, logits: Node) -> None:
    spelled, example, place = spellings.read(node), example_of(logits), timeline.position[node]
    build = Builder(graph, node, like=node)
    make = functools.partial(build, "mean" if spelled is not None and spelled[0].name == "mean" else "sum")
    if spelled is not None and spelled[0].name in _SUMS:
        asked = spelled[1].get("dtype") or example.dtype
        if torch.promote_types(asked, example.dtype) != asked:  # each logit is rounded first
            return
        result = make(make(logits, -1, dtype=torch.promote_types(asked, torch.float32)))
        if example_of(result).dtype != example_of(node).dtype:
            result = build("to", result, example_of(node).dtype)
    elif spelled is not None:
        if example_of(node).requires_grad:  # of which each that is largest has a share
            return
        result = build("max", build("amax", logits, -1))
    else:
        result = build("any", build("isnan", build("amax", logits, -1)))
    build.tell_gradients(timeline.grad_mode(place) is True)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
