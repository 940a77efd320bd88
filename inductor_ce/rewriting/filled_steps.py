"""Logits of a loop's steps that are written into a tensor that was made for them: as a stack of them.

    zs = zeros(T, N, V)                              zs = stack([linear(h, W) for h in hs])
    for t in range(T): zs[t] = linear(hs[t], W)

Decoders of tutorials have it so. Some leave out the first place, and cut it off for the loss: there the stack
has any other step, which is cut off too. The linear layers of a stack are joined in `joined_layers`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from ..common.compat.graphs import is_plain_tensor
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import constant, equal, example_of, hint, same_shape, shape_of, tensor_of
from ..graph.timeline import INFERENCE, Timeline, written_by
from ..reading import spellings
from ..reading.row_views import index_per_dimension
from ..reading.steps import View
from .joined_layers import has_loss
from .joined_steps import is_linear

_NEW = (torch.zeros, torch.empty, torch.zeros_like, torch.empty_like, "new_zeros", "new_empty")


def stack_steps(graph: Graph, min_vocab: int) -> None:
    """Stack what steps write to a new tensor, where that is logits of at least `min_vocab` classes."""
    for node in [node for node in graph.nodes if node.target in _NEW and not any(written_by(node))]:
        tensor = _last_name(node)
        example = tensor_of(tensor)
        if example is None or example.dim() < 2 or not is_plain_tensor(example):
            continue
        if hint(example.shape[-1]) >= min_vocab and has_loss(tensor):
            edits = [user for user in tensor.users if user.target is operator.setitem]
            places, timeline = _places(tensor, edits), Timeline(graph)
            if places is not None and _is_written_first(timeline, tensor, edits):
                _stack(timeline, tensor, edits, *places)


def _last_name(node: Node) -> Node:
    """What a new tensor is on its device, in its dtype."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        step = spellings.step_of(user)
        if step is None or step.view is not View.SAME:
            break
        node = user
    return node


def _places(tensor: Node, edits: list[Node]) -> tuple[int, dict[int, Node]] | None:
    """(which dimension, what is written to each place of it), where nobody reads another place."""
    found: dict[int, Node] = {}
    dims = set()
    for edit in edits:
        at, value = _only_place(edit.args[1], shape_of(tensor)), edit.args[2]
        if at is None or at[1] in found or not _is_step(tensor, edit, at[0]):
            return None
        dims.add(at[0])
        found[at[1]] = value  # type: ignore[assignment]
    if len(found) < 2 or len(dims) != 1:
        return None
    (dim,), (first, *others) = dims, found.values()
    alike = all(is_linear(each, first) for each in (first, *others))
    dtypes = {example_of(each).dtype for each in (first, *others)}
    read = (_read_of(user, tensor, dim) for user in tensor.users if user not in edits)
    if not alike or len(dtypes) != 1 or any(not found.keys() >= places for places in read):
        return None
    return dim, found


def _only_place(index: Any, shape: tuple[Any, ...]) -> tuple[int, int] | None:
    """(dimension of rows, place) of an index that is a number there, and takes all of the others."""
    pieces = index_per_dimension(index, len(shape))
    dims = [dim for dim, piece in enumerate(pieces or ()) if piece != slice(None)]
    if pieces is None or len(dims) != 1 or dims[0] == len(shape) - 1 or not isinstance(pieces[dims[0]], int):
        return None
    size = constant(shape[dims[0]])
    return None if size is None else (dims[0], pieces[dims[0]] % size)


def _is_step(tensor: Node, edit: Node, dim: int) -> bool:
    """Whether an edit writes as many logits as there are places for, and nothing else reads them."""
    value, rows = edit.args[2], [size for i, size in enumerate(shape_of(tensor)) if i != dim]
    if not isinstance(value, Node) or tensor_of(value) is None or [*value.users] != [edit]:
        return False
    same_device = example_of(value).device == example_of(tensor).device
    return same_device and same_shape(shape_of(value), rows)


def _read_of(user: Node, tensor: Node, dim: int) -> set[int]:
    """The places that somebody reads."""
    size = constant(shape_of(tensor)[dim])
    assert size is not None
    pieces = None
    if user.target is operator.getitem and user.args[0] is tensor:
        pieces = index_per_dimension(user.args[1], len(shape_of(tensor)))
    piece = slice(None) if pieces is None else pieces[dim]
    if isinstance(piece, int):
        return {piece % size}
    bounds = piece.start, piece.stop, piece.step
    is_known = all(bound is None or isinstance(bound, int) for bound in bounds)
    return {*range(size)[piece if is_known else slice(None)]}


def _is_written_first(timeline: Timeline, tensor: Node, edits: list[Node]) -> bool:
    """Whether the edits come before anybody reads, and with the gradient of what they write."""
    position = timeline.position
    last = max(map(position.__getitem__, edits))
    values: list[Any] = [edit.args[2] for edit in edits]
    modes = {timeline.grad_mode(node) for node in (*edits, *values)}
    come_first = all(user in edits or position[user] > last for user in tensor.users)
    return come_first and len(modes) == 1 and INFERENCE not in modes


def _stack(timeline: Timeline, tensor: Node, edits: list[Node], dim: int, found: dict[int, Node]) -> None:
    last = max(edits, key=timeline.position.__getitem__)
    size, any_step = shape_of(tensor)[dim], next(iter(found.values()))
    build, own = Builder(tensor.graph, last.next, like=any_step), example_of(tensor)
    with undone_on_error([build]):
        stacked = build(torch.stack, [found.get(place, any_step) for place in range(size)], dim)
        if example_of(stacked).dtype != own.dtype:
            stacked = build("to", stacked, own.dtype)
    if not all(map(equal, example_of(stacked).stride(), own.stride())):
        build.undo()
        return
    build.tell_gradients(timeline.grad_mode(last) is True)
    tensor.replace_all_uses_with(stacked, delete_user_cb=lambda user: user not in edits)
    for edit in edits:
        tensor.graph.erase_node(edit)
