"""Rows that are cut off a teacher's logits, and are 0 again in the weights: as of `logits[:, :-1]`.

    q = pad(softmax(cut(product(hidden, columns))))        a row of 0 for each that was cut off

In between each row is made of its own alone, so the rows that were cut off can be made as well, and be 0 at
the end. A piece of rows then needs to know of each whether it was.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from ..graph.shapes import equal, same_shape, shape_of
from ..graph.walk import args_of
from . import sizes
from .find import NoHead
from .kinds import is_of_size, is_ordered_view, is_pointwise, summed_dims, vocab_axis
from .nodes import on
from .pieces import Pieces

aten = torch.ops.aten

CUT, PAD = aten.slice.Tensor, aten.constant_pad_nd.default
SUMS = (aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
UNLIKE = "rows that were cut off are not put back as they were"


def uncut(cut: Node, v: int) -> tuple[set[Node], list[Node]]:
    """(all that is made of the rows that are left, with `cut`, what has all rows again)

    Raises:
        NoHead: something has those rows alone, or numbers for them.
    """
    axis = vocab_axis(cut)
    if axis is None or not equal(shape_of(cut)[axis], v) or args_of(cut)[1] % len(shape_of(cut)) == axis:
        raise NoHead("classes are cut off")
    found, padded, stack = {cut}, list[Node](), [cut]
    while stack:
        for user in stack.pop().users:
            if user in found:
                continue
            if user.target == PAD:
                if not _puts_back(user, cut):
                    raise NoHead(UNLIKE)
                padded.append(user)
            elif not _is_row_by_row(user, cut, v):
                raise NoHead(UNLIKE)
            else:
                stack.append(user)
            found.add(user)
    if any(not _is_of_no_row(s, node) for node in found - {cut, *padded} for s in _beside(node, found)):
        raise NoHead("what is left of the rows is combined with numbers for them")
    return found, padded


def _puts_back(pad: Node, cut: Node) -> bool:
    """Whether the rows that were cut off are 0 again, and the others where they were."""
    whole, amounts, *value = args_of(pad)
    source, dim, *given = args_of(cut)
    start, step = given[0] if given else None, given[2] if len(given) > 2 else 1
    rank = len(shape_of(cut))
    before = [*amounts[::2], *([0] * rank)][:rank][::-1]
    wanted = [start or 0 if i == dim % rank else 0 for i in range(rank)]
    shaped = same_shape(shape_of(whole), shape_of(cut)) and same_shape(shape_of(pad), shape_of(source))
    return shaped and step == 1 and not any(value) and before == wanted


def _is_row_by_row(node: Node, cut: Node, v: int) -> bool:
    left = math.prod(shape_of(cut)) // v
    axis = vocab_axis(node) if is_of_size(node, left * v) else None
    wide = axis is not None and equal(shape_of(node)[axis], v)
    if node.target in SUMS:
        return is_of_size(node, left) and summed_dims(node)[0] == {vocab_axis(args_of(node)[0])}
    return (wide or is_of_size(node, left)) and (is_ordered_view(node) or is_pointwise(node))


def _beside(node: Node, found: set[Node]) -> list[Node]:
    return [source for source in node.all_input_nodes if source not in found]


def _is_of_no_row(source: Node, node: Node) -> bool:
    """Whether what a node reads is the same for all rows."""
    if not isinstance(source.meta.get("val"), torch.Tensor):
        return True
    shape, axis = shape_of(source), vocab_axis(node)
    assert axis is not None
    behind = len(shape_of(node)) - len(shape)
    others = [size for i, size in enumerate(shape) if i + behind != axis]
    is_wide = axis == len(shape_of(node)) - 1
    return all(equal(size, 1) for size in (others if is_wide else shape))


class Left:
    """Which rows were left, and are not 0 again, by what puts the others back."""

    def __init__(self, pieces: Pieces):
        self._pieces = pieces
        self._known: dict[Node, Node] = {}

    def of(self, pad: Node) -> Node:
        """bool [N, 1]"""
        if pad not in self._known:
            self._known[pad] = self._made(pad)
        return self._known[pad]

    def _made(self, pad: Node) -> Node:
        build, (whole, amounts, *_) = self._pieces.build, args_of(pad)
        axis = vocab_axis(whole)
        size: list[Any] | None = sizes.of_shape(
            pad.graph, [1 if i == axis else size for i, size in enumerate(shape_of(whole))]
        )
        if size is None:
            raise NoHead("a size is no arithmetic of the inputs' sizes")
        ones = build(aten.full.default, size, 1.0, dtype=torch.float32, **on(whole))
        padded = build(aten.constant_pad_nd.default, ones, list(amounts), 0.0)
        rows = build(aten.reshape.default, padded, [self._pieces.n, 1])
        return build(aten.ne.Scalar, rows, 0)
