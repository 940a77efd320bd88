"""Blocks of columns as the columns of one tensor: of one product, where each is a product with a part of it.

F.linear(h, W[a:b]) and F.linear(h, W[b:c]) are the columns of F.linear(h, W[a:c]), whatever is done to each
element of both since. So blocks are followed back, side by side, to where all of them are consecutive slices
of one tensor; and from there what made one block is made of all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node
from torch.fx.node import map_arg

from ..graph.builder import Builder
from ..graph.shapes import constant, equal, example_of, same_shape, shape_of, tensor_of
from ..graph.timeline import Timeline
from ..reading import spellings
from ..reading.row_views import index_per_dimension, range_of
from ..reading.steps import Step, View
from ..reading.views import dimension_order
from .find_recipe import is_sized_view
from .linear_layers import linear_layer


class NotOne(Exception):
    """The blocks are not parts of one tensor."""


class OneProduct:
    """Makes one tensor of blocks, at one place.

    Args:
        build: at that place.
        timeline: whatever is read there again must read as it did.
        place: the position there.
    """

    def __init__(self, build: Builder, timeline: Timeline, place: int):
        self._build, self._timeline, self._place = build, timeline, place

    def __call__(self, nodes: Sequence[Node], axis: int) -> Node:
        """The tensor whose parts along an axis the nodes are, in their order. Raises NotOne."""
        self._check(*nodes)
        slices = [_slice(node, axis) for node in nodes]
        if all(source is slices[0][0] for source, _, _ in slices):
            return self._range(slices, axis)
        spelled = [spellings.read(node) for node in nodes]
        if nodes[0].target in (F.linear, torch.addmm):
            return self._layer(nodes, axis)
        step = spelled[0][0] if spelled[0] is not None else None
        if step is None or any(each is None or each[0] is not step for each in spelled):
            raise NotOne
        args = [each[1] for each in spelled if each is not None]
        return self._made(nodes, axis, step, args)

    def _check(self, *nodes: Node) -> None:
        """Whether what nodes hold is still there."""
        for node in nodes:
            if tensor_of(node) is None or not self._timeline.unchanged(node, node, self._place):
                raise NotOne

    def _check_modes(self, *nodes: Node) -> None:
        """Whether what is computed there is computed as nodes were."""
        mode = self._timeline.grad_mode(self._place)
        for node in nodes:
            calm = self._timeline.same_autocast(node, self._place)
            if not calm or self._timeline.grad_mode(node) != mode:
                raise NotOne

    def _range(self, slices: list[tuple[Node, int, int]], axis: int) -> Node:
        source, start, _ = slices[0]
        if any(a[1] + a[2] != b[1] for a, b in itertools.pairwise(slices)):
            raise NotOne
        self._check(source)
        total = sum(size for _, _, size in slices)
        if equal(shape_of(source)[axis], total):
            return source
        return self._build("narrow", source, axis, start, total)

    def _made(self, nodes: Sequence[Node], axis: int, step: Step, args: list[dict[str, Any]]) -> Node:
        rank = len(shape_of(nodes[0]))
        self._check_modes(*nodes)
        if step.name == "matmul":
            return self._matmul(args, axis == rank - 1)
        if step.name == "einsum":
            return self._einsum(args, axis)
        if step.view is View.ORDER:
            order = dimension_order(rank, args[0])
            if order is None or any(dimension_order(rank, each) != order for each in args):
                raise NotOne
            whole = self([each["input"] for each in args], order[axis])
            return self._build("permute", whole, order)
        if is_sized_view(nodes[0]):
            return self._reshaped(nodes, axis)
        if _is_of_each(step):
            return self._of_each(nodes, axis)
        raise NotOne

    # Products

    def _layer(self, nodes: Sequence[Node], axis: int) -> Node:
        """linear(h, W, b) and addmm(b, h, W.t())"""
        layers = [linear_layer(node, None) for node in nodes]
        if any(each is None or each.target is not nodes[0].target for each in layers):
            raise NotOne
        if axis != len(shape_of(nodes[0])) - 1:
            raise NotOne
        self._check_modes(*nodes)
        along = list(zip(*(each.args for each in layers if each is not None), strict=True))
        if nodes[0].target is torch.addmm:
            bias, hidden, columns = along
            if any(len(shape_of(each)) != 1 for each in _nodes(bias)):
                raise NotOne
            return self._build(torch.addmm, self(bias, 0), self._shared(hidden), self(_nodes(columns), 1))
        hidden, weights, biases = along
        added = None if all(each is None for each in biases) else self(_nodes(biases), 0)
        return self._build(F.linear, self._shared(hidden), self(_nodes(weights), 0), added)

    def _matmul(self, args: list[dict[str, Any]], is_last: bool) -> Node:
        columns = [each["other"] for each in args]
        if not is_last or any(tensor_of(each) is None or len(shape_of(each)) != 2 for each in columns):
            raise NotOne
        hidden = self._shared([each["input"] for each in args])
        return self._build(torch.matmul, hidden, self(columns, 1))

    def _einsum(self, args: list[dict[str, Any]], axis: int) -> Node:
        """einsum("nd,vd->nv", h, w), of which one operand has the classes and the other not."""
        equation = str(args[0]["equation"]).replace(" ", "")
        given, _, result = equation.partition("->")
        letters = given.split(",")
        if any(each["equation"] != args[0]["equation"] for each in args) or "." in equation:
            raise NotOne
        if len(letters) != 2 or not result or any(len(each["operands"]) != 2 for each in args):
            raise NotOne
        has = [letter.count(result[axis]) for letter in letters]
        if sorted(has) != [0, 1]:
            raise NotOne
        wide, other = has.index(1), has.index(0)
        operands: list[Any] = [None, None]
        operands[other] = self._shared([each["operands"][other] for each in args])
        along = letters[wide].index(result[axis])
        operands[wide] = self(_nodes([each["operands"][wide] for each in args]), along)
        return self._build(torch.einsum, equation, *operands)

    def _shared(self, nodes: Sequence[Any]) -> Any:
        """What all blocks have in common."""
        first = nodes[0]
        self._check(*dict.fromkeys(each for each in nodes if isinstance(each, Node)))
        if not all(self._is_same(first, node) for node in nodes):
            raise NotOne
        return first

    def _is_same(self, a: Any, b: Any) -> bool:
        """Whether two nodes hold the same: one node, or views, casts and scales alike of what is the same."""
        if a is b or not isinstance(a, Node) or not isinstance(b, Node):
            return a is b or (type(a) is type(b) and not isinstance(a, Node) and bool(a == b))
        step = spellings.step_of(a)
        if step is None or step is not spellings.step_of(b):
            return False
        if a.target != b.target or a.kwargs.keys() != b.kwargs.keys():
            return False
        if not _is_of_each(step) and step.view is None:
            return False
        self._check(a, b)
        if step.view is None or step.view is View.SAME:
            self._check_modes(a, b)
        one, other = _leaves((a.args, a.kwargs)), _leaves((b.args, b.kwargs))
        return len(one) == len(other) and all(map(self._is_same, one, other))

    # What is done to each element

    def _reshaped(self, nodes: Sequence[Node], axis: int) -> Node:
        sources, rows = [node.all_input_nodes[0] for node in nodes], shape_of(nodes[0])[:-1]
        last = all(equal(shape_of(s)[-1], shape_of(n)[-1]) for s, n in zip(sources, nodes, strict=True))
        if axis != len(rows) or not last or any(not same_shape(shape_of(n)[:-1], rows) for n in nodes):
            raise NotOne
        before = shape_of(sources[0])[:-1]
        if any(not same_shape(shape_of(s)[:-1], before) for s in sources):
            raise NotOne
        if any(example_of(s).dtype != example_of(n).dtype for s, n in zip(sources, nodes, strict=True)):
            raise NotOne
        whole = self(sources, len(before))
        return self._build("reshape", whole, *rows, shape_of(whole)[-1])

    def _of_each(self, nodes: Sequence[Node], axis: int) -> Node:
        first = nodes[0]
        given = [_leaves((node.args, node.kwargs)) for node in nodes]
        if any(
            len(each) != len(given[0]) or node.target != first.target
            for each, node in zip(given, nodes, strict=True)
        ):
            raise NotOne
        made: dict[Node, Node] = {}
        from_end = axis - len(shape_of(first))
        for place, leaf in enumerate(given[0]):
            along = [each[place] for each in given]
            if not isinstance(leaf, Node):
                self._shared(along)
                continue
            whole = self._operand(nodes, along, from_end)
            if made.setdefault(leaf, whole) is not whole:
                raise NotOne
        args, kwargs = map_arg((first.args, first.kwargs), made.__getitem__)
        return self._build(first.target, *args, **kwargs)

    def _operand(self, nodes: Sequence[Node], along: list[Any], from_end: int) -> Node:
        """What stands in an operation of each element: parts of a tensor, or what all blocks share."""
        operands, axis = _nodes(along), len(shape_of(nodes[0])) + from_end
        sizes = [shape_of(each) for each in operands if tensor_of(each) is not None]
        if len(sizes) != len(operands):
            raise NotOne
        varies = [len(size) >= -from_end and not equal(size[from_end], 1) for size in sizes]
        if not any(varies):
            return self._shared(operands)
        own = all(
            equal(s[from_end], shape_of(n)[axis])
            for s, n in zip(sizes, nodes, strict=True)
            if len(s) >= -from_end
        )
        if not all(varies) or not own:
            raise NotOne
        return self(operands, len(sizes[0]) + from_end)


def _is_of_each(step: Step) -> bool:
    """Whether a step computes each element by itself."""
    return step.in_chain or step.view is View.SAME or step.name == "detach"


def _nodes(given: Sequence[Any]) -> list[Node]:
    if not all(isinstance(each, Node) for each in given):
        raise NotOne
    return list(given)


def _leaves(given: Any) -> list[Any]:
    """Nodes and numbers in the arguments of a call, in order."""
    if isinstance(given, (list, tuple)):
        return [leaf for each in given for leaf in _leaves(each)]
    if isinstance(given, dict):
        return [leaf for key in sorted(given) for leaf in (key, *_leaves(given[key]))]
    if isinstance(given, slice):
        return [leaf for each in (given.start, given.stop, given.step) for leaf in _leaves(each)]
    return [given]


# Slices


def _slice(node: Node, axis: int) -> tuple[Node, int, int]:
    """(source, first, how many) of what a node is a slice of along an axis: of itself, if of nothing else."""
    size = constant(shape_of(node)[axis])
    if size is None:
        raise NotOne
    start = _start(node, axis)
    return (node, 0, size) if start is None else (*start, size)


def _start(node: Node, axis: int) -> tuple[Node, int] | None:
    spelled = spellings.read(node)
    if spelled is None:
        return None
    step, args = spelled
    source, index = args.get("input"), args.get("index")
    if not isinstance(source, Node):
        return None
    if step.name == "narrow":
        first, dim = args.get("start"), args.get("dim")
        if not isinstance(first, int) or first < 0 or not isinstance(dim, int):
            return None
        return (source, first) if dim % len(shape_of(node)) == axis else None
    if step.name != "getitem":
        return None
    if tensor_of(source) is None:
        return _part(source, index, axis) if isinstance(index, int) else None
    first = _first(index, source, axis) if len(shape_of(source)) == len(shape_of(node)) else None
    return None if first is None else (source, first)


def _first(index: Any, source: Node, axis: int) -> int | None:
    """Where x[:, a:b] begins, if it is a range along the axis and all of the others."""
    pieces, total = index_per_dimension(index, len(shape_of(source))), constant(shape_of(source)[axis])
    if pieces is None:
        return None
    taken = range_of(pieces.pop(axis), total)
    return taken[0] if taken is not None and all(piece == slice(None) for piece in pieces) else None


def _part(parts: Node, index: int, axis: int) -> tuple[Node, int] | None:
    """Where the part of a split or a chunk begins."""
    spelled = spellings.read(parts)
    if spelled is None or spelled[0].name not in ("split", "chunk"):
        return None
    source, dim = spelled[1].get("input"), spelled[1].get("dim", 0)
    if tensor_of(source) is None or not isinstance(source, Node) or not isinstance(dim, int):
        return None
    total = constant(shape_of(source)[axis])
    if total is None or dim % len(shape_of(source)) != axis:
        return None
    sizes = _sizes(spelled[0], spelled[1], total)
    return None if sizes is None or not 0 <= index < len(sizes) else (source, sum(sizes[:index]))


def _sizes(step: Step, args: dict[str, Any], total: int) -> list[int] | None:
    if step.name == "chunk":
        count = args.get("chunks")
        size = -(-total // count) if isinstance(count, int) and count > 0 else None
    else:
        size = args.get("size", args.get("split_size_or_sections", args.get("split_size")))
    if isinstance(size, (list, tuple)):
        return list(size) if all(isinstance(each, int) for each in size) else None
    if not isinstance(size, int) or size < 1:
        return None
    return [min(size, total - first) for first in range(0, total, size)]
