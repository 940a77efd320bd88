"""Pack the rows that count into pieces: the order in which rows are taken, and how many there are."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from ..common.compat.graphs import IN_MEMORY
from ..graph.builder import Builder
from ..graph.shapes import example_of, hint, shape_of, tensor_of
from ..graph.walk import args_of, reached, sources_of
from ..ops.counted import ALIGNED, HOST_COPY, RECORDED, ROW_ORDER, TAKE_ROWS
from .nodes import iota, on
from .ranges import Range

aten, prims = torch.ops.aten, torch.ops.prims

# Who looks at how many rows count.
HOST, DEVICE, RECORDING = "the host", "the device", "the device, or who records a CUDA graph"

LABELS = 4  # tensors of the size of labels, and not of the hidden states, are no more than this times N


class Packing:
    """The rows of a head in the order in which its pieces take them.

    Args:
        build: makes nodes.
        counts: which rows count, bool [N].
        pieces: of that order.
        looks: who looks at how many count, HOST, DEVICE or RECORDING.

    Attributes:
        counts, place: which rows count, and where each is in the order, [N].
        left: how many rows are computed from the first of each piece on, see `ops/counted.py`.
    """

    def __init__(self, build: Builder, counts: Node, pieces: list[Range], looks: str):
        self._build, self.counts = build, counts
        made = build(ROW_ORDER, counts)
        self._order, self.place, count = (build(operator.getitem, made, i) for i in range(3))
        left = self._left(count, pieces)
        if looks == RECORDING:
            head = sum(node.target == RECORDED for node in counts.graph.nodes)
            left = build(RECORDED, left, shape_of(counts)[0], head)
        copied = example_of(counts).device.type != "cpu" and looks == HOST
        self.left, self._host = left, build(HOST_COPY, left) if copied else None
        self._moved: dict[tuple[Node, float | None], Node] = {}
        self._taken: dict[tuple[Node, Range], Node] = {}

    def _left(self, count: Node, pieces: list[Range]) -> Node:
        """Rows to be computed from the first of each piece on, [P]."""
        build = self._build
        index = iota(build, len(pieces), torch.int32, example_of(count).device)
        step = pieces[0].end if len(pieces) > 1 else 0
        left = build(aten.sub.Tensor, count, build(aten.mul.Tensor, index, step))
        return build(aten.bitwise_and.Scalar, build(aten.add.Tensor, left, ALIGNED - 1), -ALIGNED)

    def limit(self, piece: Range) -> dict[str, Any]:
        """What products are given to compute of a piece the rows that count."""
        return {"left": self.left, "host": self._host, "piece": piece.index}

    def cut(self, node: Node, piece: Range, dim: int) -> Node:
        """The rows of a piece, along a dimension of what has all.

        NOTE All are moved, and then cut. torch asks of what is indexed, or broadcast, whether its size is 1,
        and a graph of pieces of one row would be another. Inductor makes of it what is read.
        """
        rank = example_of(node).dim()
        if rank == 1:
            return self._sliced(self._in_pieces(node), piece)
        moved = self._build(aten.index.Tensor, node, [*[None] * (dim % rank), self._order])
        return self._sliced(moved, piece, dim % rank)

    def counted(self, node: Node, piece: Range, dim: int, otherwise: float) -> Node:
        """The same, with another value in rows that do not count."""
        if example_of(node).dim() == 1:
            return self._sliced(self._in_pieces(node, otherwise), piece)
        return self.cut(self.all_counted(node, otherwise, dim), piece, dim)

    def taken(self, x: Node, piece: Range, after: list[Node]) -> Node:
        """The rows of a piece of x [N, D], 0 where they do not count, once what is in `after` is made."""
        if (x, piece) not in self._taken:
            counted = self._sliced(self._in_pieces(self.counts), piece)
            given = (x, self._sliced(self._order, piece), counted, after)
            self._taken[x, piece] = self._build(TAKE_ROWS, *given, **self.limit(piece))
        return self._taken[x, piece]

    def order(self) -> tuple[Node, Node]:
        """(the rows as the pieces take them, one after another, and which of these count), [N]"""
        return self._order, self._in_pieces(self.counts)

    def all_limit(self) -> dict[str, Any]:
        """What an operator is given to compute, of all rows in that order, those that count."""
        return {"left": self.left, "host": self._host}

    def put_back(self, x: Node, dtype: torch.dtype) -> Node:
        """What has rows as the pieces took them, [N, D], as they were, 0 where they do not count."""
        return self._build(TAKE_ROWS, x, self.place, self.counts, [], dtype=dtype)

    def _in_pieces(self, node: Node, otherwise: float | None = None) -> Node:
        """What rows have, as the pieces take them, once for all pieces: it is in memory."""
        if (node, otherwise) not in self._moved:
            made = self._build(aten.index.Tensor, node, [self._order])
            if otherwise is not None:
                made = self._or(made, self._in_pieces(self.counts), 0, otherwise)
            made.meta[IN_MEMORY] = True
            self._moved[node, otherwise] = made
        return self._moved[node, otherwise]

    def _sliced(self, node: Node, piece: Range, dim: int = 0) -> Node:
        return self._build(aten.slice.Tensor, node, dim, piece.start, piece.end)

    def cleared(self, node: Node, piece: Range) -> Node:
        """A piece as it is made, 0 in rows that do not count, which need not have been computed."""
        return self._or(node, self.cut(self.counts, piece, 0), 0, 0.0)

    def all_counted(self, node: Node, otherwise: float, dim: int = -1) -> Node:
        """What has all rows along a dimension, with another value in rows that do not count."""
        return self._or(node, self.counts, dim, otherwise)

    def _or(self, node: Node, counts: Node, dim: int, otherwise: float) -> Node:
        example = example_of(node)
        if otherwise < 0 and not example.dtype.is_signed:
            node = self._build(prims.convert_element_type.default, node, torch.int64)
            example = example_of(node)
        for _ in range(example.dim() - 1 - dim % example.dim()):
            counts = self._build(aten.unsqueeze.default, counts, -1)
        other = self._build(aten.full.default, [], otherwise, dtype=example.dtype, **on(node))
        return self._build(aten.where.self, counts, node, other)

    def in_all_rows(self, part: Node, piece: Range) -> Node:
        """A piece [K, n] in the place of its rows among all, [K, N], and 0 elsewhere."""
        build = self._build
        index = build(aten.sub.Tensor, self.place, piece.start)
        last = self._minus(self._minus(piece.end, piece.start), 1)
        inside = build(aten.clamp_max.default, build(aten.clamp_min.default, index, 0), last)
        there = build(aten.eq.Tensor, index, inside)
        return self._or(build(aten.index.Tensor, part, [None, inside]), there, 1, 0.0)

    def _minus(self, a: Any, b: Any) -> Any:
        return a - b if isinstance(a, int) and isinstance(b, int) else self._build(operator.sub, a, b)

    def in_order(self, node: Node, dim: int) -> Node:
        """What the pieces made, one after another along a dimension, in the order of the rows."""
        return self._build(aten.index.Tensor, node, [*[None] * dim, self.place])


def counted_first(order: list[Node]) -> list[Node]:
    """Nodes in an order in which rows are counted before anything else is done.

    So the host knows how many there are long before it comes to a head. Where they are counted by anything
    larger than labels, that is done where it was.
    """
    copies = [node for node in order if node.target == HOST_COPY]
    counted = [set(reached([copy], sources_of)) for copy in copies]
    first = {node for nodes in counted if is_light(nodes, _most_rows(nodes)) for node in nodes}
    first |= {node for node in order if node.op == "placeholder"}
    return [node for node in order if node in first] + [node for node in order if node not in first]


def _most_rows(nodes: Iterable[Node]) -> int:
    """Of what is counted, as much as there is: which rows of a head count may depend on another's."""
    return max(hint(shape_of(args_of(node)[0])[0]) for node in nodes if node.target == ROW_ORDER)


def is_light(nodes: Iterable[Node], n: Any) -> bool:
    """Whether what counts n rows makes nothing larger than labels."""
    made = [tensor_of(node) for node in nodes if node.op == "call_function"]
    return all(tensor is None or hint(tensor.numel()) <= LABELS * hint(n) for tensor in made)
