"""Tensors that are stacked, and taken again one by one: stack(xs, d)[..., i, ...] = xs[i][..., ...].

Several heads' logits are put beside each other by a model, and each loss takes those of its head. What is
stacked is in memory once more, and hides the linear layers from the losses. Between the two may be casts, and
ranges of the other dimensions.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import equal, hint, requires_grad, same_shape, shape_of, tensor_of
from ..graph.timeline import Timeline
from ..graph.walk import reached
from ..reading import spellings
from ..reading.row_views import index_per_dimension
from ..reading.steps import View
from .rewrite import erase_with_sources

_STACKS = (torch.stack, torch.cat, torch.concat, torch.concatenate)


class Taken(NamedTuple):
    """A node that is of the `place`-th part what `chain` makes of it, and of that `items`, by dimensions."""

    node: Node
    place: int
    chain: tuple[Node, ...]
    items: tuple[Any, ...]


def take_parts(graph: Graph, min_vocab: int) -> None:
    """Take of the parts what is taken of stacks with at least `min_vocab` entries in a dimension."""
    for node in [node for node in graph.nodes if node.target in _STACKS]:
        example = tensor_of(node)
        if example is None or max(map(hint, example.shape), default=0) < min_vocab:
            continue
        timeline = Timeline(graph)
        parts, dim = _parts(node)
        taken = list(_taken(node, dim, len(parts), ())) if parts else []
        read = [each for each in taken if each is not None]
        if read and len(read) == len(taken) and _may_be(timeline, node, parts, read):
            _take(graph, dim, parts, read)


def _parts(node: Node) -> tuple[list[Node], int]:
    """What is stacked, and in which dimension; nothing where it is not alike, or read by somebody else."""
    step, args = spellings.read(node) or (None, {})
    tensors, dim = args.get("tensors"), args.get("dim", 0)
    if step is None or not isinstance(tensors, (list, tuple)) or not isinstance(dim, int) or len(tensors) < 2:
        return [], 0
    dim %= len(shape_of(node))
    parts = [each if step.name == "stack" else _before_new(each, node, dim) for each in tensors]
    made = [part for part in parts if part is not None and _is_made_for(part, {node, *tensors})]
    examples = [tensor_of(part) for part in made]
    alike = len({(e.dtype, e.device) for e in examples if e is not None}) == 1
    return (made, dim) if alike and len(made) == len(tensors) else ([], 0)


def _before_new(part: Any, node: Node, dim: int) -> Node | None:
    """What a part is, of a concatenation, without the dimension of size 1 that a view has put there."""
    step = spellings.step_of(part) if isinstance(part, Node) and [*part.users] == [node] else None
    if step is None or not part.args or tensor_of(part) is None:
        return None
    if step.view not in (View.RESHAPE, View.SLICE):
        return None
    shape, source = shape_of(part), part.args[0]
    if not equal(shape[dim], 1) or not isinstance(source, Node) or tensor_of(source) is None:
        return None
    return source if same_shape(shape_of(source), shape[:dim] + shape[dim + 1 :]) else None


def _is_made_for(part: Node, readers: set[Any]) -> bool:
    """Whether a part is a tensor of its own that nothing but the stack reads, laid out as the stack's."""
    example = tensor_of(part)
    if example is None or not example.is_contiguous() or not all(user in readers for user in part.users):
        return False
    while (step := spellings.step_of(part)) is not None and step.view is not None:
        source = part.args[0]
        if not isinstance(source, Node) or [*source.users] != [part]:
            return False
        part = source
    return part.op not in ("placeholder", "get_attr", "output")


def _taken(node: Node, dim: int, count: int, chain: tuple[Node, ...]) -> Iterator[Taken | None]:
    """All that is read of a stack, and of the steps that follow it; None for what is no part."""
    for user in node.users:
        step, args = spellings.read(user) or (None, {})
        rank, over = len(shape_of(node)), args.get("dim", 0)
        beside = [each for each in user.all_input_nodes if each is not node and tensor_of(each) is not None]
        if step is None or args.get("input") is not node or beside:
            yield None
        elif step.name == "same" and step.view is View.SAME and tensor_of(user) is not None:
            yield from _taken(user, dim, count, (*chain, user))
        elif step.name == "unbind" and isinstance(over, int) and over % rank == dim:
            yield from (_unbound(each, count, chain, rank - 1) for each in user.users)
        elif (index := _index(step.name, args, rank)) is not None:
            place = index[dim]
            if place == slice(None) and not any(isinstance(each, int) for each in index):
                yield from _taken(user, dim, count, (*chain, user))
            elif isinstance(place, int) and -count <= place < count:
                yield Taken(user, place % count, chain, (*index[:dim], *index[dim + 1 :]))
            else:
                yield None
        else:
            yield None


def _index(name: str, args: dict[str, Any], rank: int) -> list[Any] | None:
    """What a node takes of each dimension."""
    if name == "getitem":
        return index_per_dimension(args.get("index"), rank)
    if name != "select" or not isinstance(args.get("dim"), int) or not isinstance(args.get("index"), int):
        return None
    dim = args["dim"] % rank
    return [args["index"] if d == dim else slice(None) for d in range(rank)]


def _unbound(node: Node, count: int, chain: tuple[Node, ...], rank: int) -> Taken | None:
    place = node.args[1] if node.target is operator.getitem else None
    if not isinstance(place, int) or not -count <= place < count:
        return None
    return Taken(node, place % count, chain, (slice(None),) * rank)


def _may_be(timeline: Timeline, node: Node, parts: list[Node], taken: list[Taken]) -> bool:
    """Whether the parts give what is taken, with the same gradients.

    NOTE Gradients
    A part of which nothing that has a gradient is taken has one of zeros by the stack, and none without it.
    """
    start = timeline.position[node]
    if any(map(requires_grad, parts)):
        if not requires_grad(node):  # without which the parts themselves would have one
            return False
        needed = {each.place for each in taken if _is_differentiated(timeline, each.node)}
        if len(needed) < len(parts) or not all(map(requires_grad, parts)):
            return False
    if any(node.target in ("as_strided", torch.as_strided) for node in timeline.nodes):
        return False
    read = {each for t in taken for each in (*t.chain, t.node)}
    modes = {timeline.grad_mode(each) for each in (node, *read)}
    unedited = all(timeline.unchanged(each, each) for each in (node, *read))
    return len(modes) == 1 and unedited and all(timeline.unchanged(part, start) for part in parts)


def _is_differentiated(timeline: Timeline, node: Node) -> bool:
    """Whether what a graph returns has a gradient by a node, for all that examples and modes tell."""

    def carriers(node: Node) -> list[Node]:
        return [user for user in node.users if user.op == "output" or carries(user)]

    def carries(user: Node) -> bool:
        is_on = timeline.grad_mode(user) is True
        return is_on and (tensor_of(user) is None or requires_grad(user))

    return any(each.op == "output" for each in reached([node], carriers))


def _take(graph: Graph, dim: int, parts: list[Node], taken: list[Taken]) -> None:
    builds = [Builder(graph, each.node, like=each.node) for each in taken]
    with undone_on_error(builds):
        results = [_of_part(*each, parts, dim) for each in zip(builds, taken, strict=True)]
    for each, result in zip(taken, results, strict=True):
        each.node.replace_all_uses_with(result)
    erase_with_sources(each.node for each in taken)


def _of_part(build: Builder, taken: Taken, parts: list[Node], dim: int) -> Node:
    result = parts[taken.place]
    for step in taken.chain:
        if spellings.is_step(step, "same"):
            result = build.again(step, {step.all_input_nodes[0]: result})
        else:
            index = _index("getitem", spellings.read(step)[1], len(shape_of(step)))  # type: ignore[index]
            result = build(operator.getitem, result, (*index[:dim], *index[dim + 1 :]))  # type: ignore[index]
    if any(index != slice(None) for index in taken.items):
        result = build(operator.getitem, result, taken.items)
    return result
