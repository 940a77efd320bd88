"""Probabilities of a loop's steps that are joined for a loss: those of the joined logits.

    stack([log_softmax(x, -1) for x in xs], 1)                  = log_softmax(stack(xs, 1), -1)
    cat([linear(h, W).log_softmax(-1)[:, None] for h in hs], 1) = log_softmax(linear(h', W), -1)
        for h' = cat([h[:, None] for h in hs], 1)

A decoder makes those of each step, and a loss picks of all at once. As many numbers are joined as before; of
linear layers with one weight, the hidden states, and the head is in pieces.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import example_of, hint, same_shape, shape_of, tensor_of
from ..graph.timeline import Timeline, written_by
from ..reading import spellings

_FUNCTIONS = {"log_softmax": torch.log_softmax, "softmax": torch.softmax}
_JOINS = (torch.stack, torch.cat, torch.concat, torch.concatenate)
_PICKS = ("gather", "take_along", "nll_loss", "getitem", "mul", "max", "amax")
_UNSQUEEZES = (torch.unsqueeze, "unsqueeze")
_PRODUCTS = (torch.matmul, torch.mm, operator.matmul, "matmul", "mm")


class Part(NamedTuple):
    """One of what is joined: a function of all classes of x, perhaps with a dimension more."""

    function: Node
    view: Node | None
    x: Node
    axis: int  # of the classes, in what is joined


def join_steps(graph: Graph, min_vocab: int) -> None:
    """Join the logits, or hidden states, where probabilities over at least `min_vocab` classes are joined."""
    for node in joins(graph):
        parts = _parts(node)
        axis = _axis(node, parts[0]) if parts else None
        if axis is None or hint(shape_of(node)[axis]) < min_vocab or not _is_picked_of(node):
            continue
        timeline = Timeline(graph)
        if _may_move(timeline, node, parts):
            _join(graph, timeline, node, parts)


def joins(graph: Graph) -> list[Node]:
    """What joins tensors, and does not write to one that is given for that."""
    return [node for node in graph.nodes if node.target in _JOINS and not any(written_by(node))]


def _is_picked_of(node: Node) -> bool:
    """Whether the whole is read class by class, and no part is added to another, as in a mixture."""
    frontier, is_picked = [node], False
    while frontier:
        for user in frontier.pop().users:
            step = spellings.step_of(user)
            if step is None:
                return False
            if step.name in _PICKS:
                is_picked = True
            elif step.view is not None or step.takes_log:
                frontier.append(user)
            else:
                return False
    return is_picked


def _parts(node: Node) -> list[Part]:
    """The parts of a join, where they are alike and nothing else reads them; else none."""
    tensors = spellings.read(node)[1].get("tensors")  # type: ignore[index]
    if tensor_of(node) is None or not isinstance(tensors, (list, tuple)):
        return []
    parts = [_part(node, each) for each in tensors]
    found = [part for part in parts if part is not None]
    kinds = {(*_kind(part.function), part.axis, tensor_of(part.x).dtype) for part in found}  # type: ignore[union-attr]
    fits = len(found) == len(parts) > 1 and len(kinds) == 1 and _axis(node, found[0]) is not None
    return found if fits else []


def _part(node: Node, each: Any) -> Part | None:
    if not isinstance(each, Node) or tensor_of(each) is None or [*each.users] != [node]:
        return None
    view = None if spellings.step_of(each) is None or _kind(each)[0] in _FUNCTIONS else each
    function = each if view is None else next(iter(each.args), None)
    if not isinstance(function, Node) or _kind(function)[0] not in _FUNCTIONS:
        return None
    args = spellings.read(function)[1]  # type: ignore[index]
    x, dim = args.get("input"), args.get("dim")
    if not isinstance(x, Node) or tensor_of(x) is None or not isinstance(dim, int):
        return None
    if not all(user is node or [*user.users] == [node] for user in function.users):
        return None
    axis = widened(view, len(shape_of(x)), dim % len(shape_of(x)))
    return None if axis is None else Part(function, view, x, axis)


def _kind(function: Node) -> tuple[str, Any]:
    """(which function, the dtype that it is asked for)"""
    spelled = spellings.read(function)
    return ("", None) if spelled is None else (spelled[0].name, spelled[1].get("dtype"))


def widened(view: Node | None, rank: int, axis: int) -> int | None:
    """Where a dimension is once a view has put others of size 1 in front of it, or behind."""
    if view is None:
        return axis
    if view.target in _UNSQUEEZES:
        dim = view.args[1] if len(view.args) > 1 else view.kwargs.get("dim")
        return axis + (dim % (rank + 1) <= axis) if isinstance(dim, int) else None
    if view.target is not operator.getitem:
        return None
    index = view.args[1]
    items = index if isinstance(index, tuple) else (index,)
    if any(not (item is None or item == slice(None)) for item in items) or items.count(None) > 1:
        return None
    places = [place for place, item in enumerate(items) if item is not None]
    places += range(len(items), len(items) + rank - len(places))
    return places[axis]


def _axis(node: Node, part: Part) -> int | None:
    """The dimension of the classes in the whole; None where it is joined along that."""
    step, args = spellings.read(node)  # type: ignore[misc]
    dim, rank = args.get("dim", 0), len(shape_of(node))
    if not isinstance(dim, int):
        return None
    if step.name == "stack":
        return part.axis + (dim % rank <= part.axis)
    return None if dim % rank == part.axis else part.axis


def _may_move(timeline: Timeline, node: Node, parts: list[Part]) -> bool:
    """Whether the functions give the same, with the same gradients, where the whole is made for good."""
    if not timeline.unchanged(node, node):
        return False
    for part in parts:
        made = [each for each in (part.function, part.view) if each is not None]
        if not is_alike(timeline, part.function, node, [part.x]) or not is_as_made(timeline, made, node):
            return False
    return True


def is_as_made(timeline: Timeline, made: list[Node], node: Node) -> bool:
    """Whether what is made of each other is where the whole is as it was, and has its gradient, or none."""
    place = timeline.position[node]
    return all(
        timeline.grad_mode(each) == timeline.grad_mode(place) and timeline.unchanged(each, each, place)
        for each in made
    )


def is_alike(timeline: Timeline, made: Node, node: Node, sources: list[Node]) -> bool:
    """Whether a node that was made of some sources is made alike where the whole is."""
    start, end = timeline.position[made], timeline.position[node]
    alike = timeline.grad_mode(start) == timeline.grad_mode(end) and timeline.same_autocast(start, end)
    return alike and all(timeline.unchanged(each, start, end) for each in sources)


def _join(graph: Graph, timeline: Timeline, node: Node, parts: list[Part]) -> None:
    build = Builder(graph, node, like=node)
    axis, (name, dtype) = _axis(node, parts[0]), _kind(parts[0].function)
    with undone_on_error([build]):
        joined = _product(build, timeline, node, parts) or _joined(build, node, parts, [p.x for p in parts])
        as_asked = {} if dtype is None else {"dtype": dtype}
        result = as_like(timeline, build(_FUNCTIONS[name], joined, axis, **as_asked), parts[0].function)
        build.tell_gradients(timeline.grad_mode(node) is True)
    made, own = tensor_of(result), tensor_of(node)
    if made is None or own is None or made.dtype != own.dtype or not same_shape(made.shape, own.shape):
        build.undo()
        return
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    for each in dict.fromkeys(x for part in parts for x in (part.view, part.function, part.x)):
        if each is not None and not each.users and (spellings.is_repeatable(each) or is_linear(each, each)):
            graph.erase_node(each)


def _joined(build: Builder, node: Node, parts: list[Part], sources: list[Node]) -> Node:
    """The same join of other tensors than the parts' functions."""
    made = {}
    for part, source in zip(parts, sources, strict=True):
        wider = source if part.view is None else build.again(part.view, {part.function: source})
        made[part.view or part.function] = wider
    return build.again(node, made)


def _product(build: Builder, timeline: Timeline, node: Node, parts: list[Part]) -> Node | None:
    """The linear layer of the joined hidden states, where all parts are of one, the classes last."""
    first, last = parts[0].x, len(shape_of(node)) - 1
    if _axis(node, parts[0]) != last or not all(is_linear(part.x, first) for part in parts):
        return None
    functions = {part.function for part in parts}
    for part in parts:
        hidden = part.x.args[0]
        alone = all(user in functions for user in part.x.users)
        alike = is_alike(timeline, part.x, node, part.x.all_input_nodes)
        if not alone or not alike or not has_weight_of(timeline, part.x, first):
            return None
        if len(shape_of(hidden)) != len(shape_of(part.x)):  # type: ignore[arg-type]
            return None
    hiddens: list[Any] = [part.x.args[0] for part in parts]
    if len({example_of(hidden).dtype for hidden in hiddens}) > 1:
        return None
    target = first.target if first.target is F.linear else torch.matmul
    result = build(target, _joined(build, node, parts, hiddens), *first.args[1:], **first.kwargs)
    return as_like(timeline, result, first)


def as_like(timeline: Timeline, made: Node, like: Node) -> Node:
    """A node whose example has the dtype of another one: of what autocast casts examples do not know."""
    own, example = example_of(like), example_of(made)
    if timeline.has_autocast(like) and example.dtype != own.dtype:
        made.meta["example_value"] = example.to(own.dtype)
    return made


def is_linear(x: Node, first: Node) -> bool:
    """Whether a node is the linear layer, or the product with the matrix, that the first is.

    Of several matrices, as `bmm` has them, the rows of a product are not its own alone.
    """
    if x.target is not first.target or x.target not in (F.linear, *_PRODUCTS) or x.kwargs != first.kwargs:
        return False
    if len(x.args) < 2 or not isinstance(x.args[0], Node) or len(x.args) != len(first.args):
        return False
    matrix = tensor_of(x.args[1])
    if matrix is None or matrix.dim() != 2 or any(map(_has_rows, (*x.args[2:], *x.kwargs.values()))):
        return False
    return all(map(_is_same, x.args[1:], first.args[1:]))


def _has_rows(bias: Any) -> bool:
    example = tensor_of(bias)
    return example is not None and example.dim() > 1


def has_weight_of(timeline: Timeline, x: Node, first: Node) -> bool:
    """Whether views and copies that two layers take of one weight are the same in numbers and gradient."""
    for a, b in zip(x.args[1:], first.args[1:], strict=True):
        if a is b or not isinstance(a, Node) or not isinstance(b, Node):
            continue
        early, late = sorted((timeline.position[a], timeline.position[b]))
        if timeline.grad_mode(early) != timeline.grad_mode(late):
            return False
        if not all(timeline.unchanged(source, early, late) for source in a.all_input_nodes):
            return False
    return True


def _is_same(a: Any, b: Any) -> bool:
    """One node, or one view of one: Dynamo has `w.t()` as often as it is written."""
    if a is b or not isinstance(a, Node) or not isinstance(b, Node):
        return a is b
    step = spellings.step_of(a)
    is_view = step is not None and step.view is not None
    return is_view and (a.target, a.args, a.kwargs) == (b.target, b.args, b.kwargs)
