"""Logits of a loop's steps, or of parts of the rows, that are joined for a loss: of joined hidden states.

    stack([linear(h, W) for h in hs], 1)          = linear(stack(hs, 1), W)
    cat([linear(h, W).float() for h in hs])       = linear(cat(hs), W).float()

As many numbers are joined as hidden states have, and the head is in pieces. Casts and functions of each
element that all parts have, as a soft-cap, come behind the join; ranges of rows are cut of hidden states.
Probabilities that are joined are in `joined_steps`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..common.compat.graphs import is_plain_tensor
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import example_of, hint, same_shape, shape_of, tensor_of
from ..graph.timeline import Timeline
from ..graph.walk import reached
from ..reading import spellings
from ..reading.steps import Step
from .chosen_rows import cuts_rows
from .find_recipe import is_elementwise, is_of_each
from .joined_steps import as_like, has_weight_of, is_alike, is_as_made, is_linear, joins, widened


class Layer(NamedTuple):
    """One of what is joined: a linear layer, and what is done to it behind, in order."""

    product: Node
    between: list[Node]


def join_layers(graph: Graph, min_vocab: int) -> None:
    """Join hidden states where logits over at least `min_vocab` classes are joined for a loss."""
    for node in joins(graph):
        layers = _layers(node, min_vocab)
        if layers and has_loss(node):
            timeline = Timeline(graph)
            if all(_may_move(timeline, node, layer, layers[0]) for layer in layers):
                _join(graph, timeline, node, layers)


def _layers(node: Node, min_vocab: int) -> list[Layer]:
    """What is joined, where it is all of one linear layer, and along its rows; else none."""
    _, args = spellings.read(node)  # type: ignore[misc]
    tensors, dim, example = args.get("tensors"), args.get("dim", 0), tensor_of(node)
    if example is None or not isinstance(tensors, (list, tuple)) or not isinstance(dim, int):
        return []
    if not is_plain_tensor(example):
        return []
    found = [layer for each in tensors if (layer := _layer(node, each)) is not None]
    last = example.dim() - 1
    if len(found) < max(2, len(tensors)) or dim % (last + 1) == last or hint(example.shape[-1]) < min_vocab:
        return []
    first = found[0]
    alike = (is_linear(each.product, first.product) and _steps(each) == _steps(first) for each in found)
    dtypes = {example_of(_hidden(each)).dtype for each in found}
    return found if all(alike) and len(dtypes) == 1 else []


def _layer(node: Node, each: Any) -> Layer | None:
    """The linear layer before one of what is joined, where nothing else reads that."""
    between: list[Node] = []
    reader = node
    while isinstance(each, Node) and tensor_of(each) is not None and [*each.users] == [reader]:
        if is_linear(each, each):
            behind = between[::-1]
            rank = len(shape_of(each))
            kept = rank == len(shape_of(_hidden(Layer(each, behind)))) and _axis(behind, rank) is not None
            return Layer(each, behind) if kept else None
        if len(each.all_input_nodes) != 1 or not (_is_of_each(each) or _widens(each) or cuts_rows(each)):
            return None
        between.append(each)
        reader, (each,) = each, each.all_input_nodes
    return None


def _hidden(layer: Layer) -> Node:
    return layer.product.args[0]  # type: ignore[return-value]


def _steps(layer: Layer) -> list[Any]:
    """What is done behind a layer to each element, the same for layers that may be joined."""
    steps = filter(_is_of_each, layer.between)
    return [(each.target, *map_arg((each.args, each.kwargs), lambda source: None)) for each in steps]


def _is_of_each(node: Node) -> bool:
    """Whether a node is a cast, or a function of each element."""
    step = spellings.step_of(node)
    return step is not None and is_of_each(step)


def _widens(node: Node) -> bool:
    example = tensor_of(node.args[0]) if node.args else None
    return example is not None and widened(node, example.dim(), example.dim() - 1) is not None


def _axis(between: list[Node], rank: int) -> int | None:
    """Where the classes are behind some steps, if they are last; else None."""
    axis = rank - 1
    for each in between:
        if _widens(each):
            moved = widened(each, rank, axis)
            rank += 1
            if moved != rank - 1:
                return None
            axis = moved
    return axis


def has_loss(node: Node) -> bool:
    """Whether a loss is taken of what a node makes."""

    def through(node: Node) -> list[Node]:
        return [user for user, step in _steps_behind(node) if step.view is not None or is_elementwise(step)]

    behind = (step for each in reached([node], through) for _, step in _steps_behind(each))
    return any(step.is_loss or step.normalises for step in behind)


def _steps_behind(node: Node) -> list[tuple[Node, Step]]:
    return [(user, step) for user in node.users if (step := spellings.step_of(user)) is not None]


def _may_move(timeline: Timeline, node: Node, layer: Layer, first: Layer) -> bool:
    """Whether a layer makes the same, with the same gradients, where it is joined."""
    product, between = layer
    return (
        is_alike(timeline, product, node, product.all_input_nodes)
        and has_weight_of(timeline, product, first.product)
        and is_as_made(timeline, [product, *between], node)
    )


def _join(graph: Graph, timeline: Timeline, node: Node, layers: list[Layer]) -> None:
    build = Builder(graph, node, like=node)
    first = layers[0]
    with undone_on_error([build]):
        hiddens = {}
        for product, between in layers:
            of: Any = product.args[0]
            for each in between:
                of = of if _is_of_each(each) else build.again(each, of)
            hiddens[between[-1] if between else product] = of
        joined = build.again(node, hiddens)
        target = F.linear if first.product.target is F.linear else torch.matmul
        result = build(target, joined, *first.product.args[1:], **first.product.kwargs)
        result = as_like(timeline, result, first.product)
        for each in filter(_is_of_each, first.between):
            result = build.again(each, result)
        build.tell_gradients(timeline.grad_mode(node) is True)
    made, own = example_of(result), example_of(node)
    if made.dtype != own.dtype or not same_shape(made.shape, own.shape):
        build.undo()
        return
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    for each in dict.fromkeys(each for product, between in layers for each in (*reversed(between), product)):
        graph.erase_node(each)
