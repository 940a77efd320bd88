"""The teacher of a head for some rows: its logits, the weights made of them, and its sums for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .. import ops
from ..common.compat.graphs import IN_MEMORY
from ..graph.shapes import equal, example_of, shape_of, tensor_of
from ..graph.walk import args_of
from . import sizes
from .cut_rows import PAD, SUMS, Left
from .find import NoHead, Teacher
from .kinds import is_of_size, is_pointwise
from .nodes import on
from .pieces import Pieces
from .ranges import Range

aten = torch.ops.aten


class Taught:
    """What is made of a teacher's logits, for one piece of rows after another.

    Args:
        pieces: of the student's head, cut along rows, which are given the weights that are made.
        teacher: the teacher.
    """

    def __init__(self, pieces: Pieces, teacher: Teacher):
        self.pieces, self.build, self.teacher = pieces, pieces.build, teacher
        self._left = Left(pieces)
        inside = {*teacher.nodes}
        self._read = [n for n in teacher.nodes if n in teacher.sums and not inside.issuperset(n.users)]
        self._parts: dict[Node, list[Node]] = {node: [] for node in self._read}
        self._made: dict[Node, Node] = {}

    @property
    def late(self) -> set[Node]:
        return self.teacher.late

    def begin(self, piece: Range, after: list[Node]) -> list[Node]:
        """Make of a piece what needs no statistics of the student, once what is in `after` is made.

        Returns what the student's logits wait for: the teacher's, and their sums.
        """
        after = self.pieces.waited(after)
        made = {p.node: self.pieces.product(p, piece, after) for p in self.teacher.products}
        self._made = self.pieces.weights = made
        for node in self.teacher.nodes:
            if node not in self.late:
                self.make(node, piece, {})
        return [*after, *(self.early_sums().values() or (made[p.node] for p in self.teacher.products))]

    def make(self, node: Node, piece: Range, rows: dict[Node, Node]) -> Node:
        """One node; `rows` has values for all rows, of which those of the piece are right."""
        made = self._made
        if node.target in (ops.ROW_STATS, *SUMS):
            made[node] = self._sum(node, piece)
            if node in self._parts:
                self._parts[node].append(made[node])
        elif node.target == PAD:
            source, left = made[args_of(node)[0]], self.pieces.cut(self._left.of(node), piece, 0)
            zero = self.build(aten.full.default, [], 0.0, dtype=example_of(source).dtype, **on(source))
            made[node] = self.build(aten.where.self, left, source, zero)
        elif is_pointwise(node):
            made[node] = self._again(node, piece, rows)
        else:
            made[node] = made[args_of(node)[0]]
        return made[node]

    def _sum(self, node: Node, piece: Range) -> Node:
        source = self._made[args_of(node)[0]]
        if node.target == ops.ROW_STATS:
            return self.pieces.stats(node, source, piece)
        return self.build(node.target, source, [1], True, **node.kwargs)

    def _again(self, node: Node, piece: Range, rows: dict[Node, Node]) -> Node:
        def part(source: Node) -> Node:
            if source in self._made:
                return self._made[source]
            whole = rows.get(source, source)
            if source in rows:  # a loop over the classes would make its logarithm anew for each
                whole.meta[IN_MEMORY] = True
            if is_of_size(node, self.pieces.head.n) or _is_one(whole):
                return self._numbers(whole, piece)
            return self.pieces.part(whole, node, piece)

        return self.pieces.pointwise(node, part)

    def _numbers(self, source: Node, piece: Range) -> Node:
        """A number for each row of a piece, [n, 1], or one for all."""
        if tensor_of(source) is None or not shape_of(source):
            return source
        if _is_one(source):
            return self.build(aten.reshape.default, source, [1, 1])
        if not is_of_size(source, self.pieces.head.n):
            raise NoHead("what is made of the teacher's logits is combined with numbers of some rows")
        return self.pieces.cut(self.build(aten.reshape.default, source, [self.pieces.n, 1]), piece, 0)

    def early_sums(self) -> dict[Node, Node]:
        """The sums of the piece, [n, 1] or [K, n], that are made before the statistics of the student."""
        early = self.teacher.sums - self.late
        return {node: self._made[node] for node in self.teacher.nodes if node in early}

    def sums(self) -> list[Node]:
        """Those of the piece that anything else reads: once they are made, its logits are read for none."""
        return [parts[-1] for parts in self._parts.values()]

    def whole(self) -> dict[Node, Node]:
        """What stands for each sum: that of all rows."""
        return {node: self._joined(node, parts) for node, parts in self._parts.items()}

    def _joined(self, node: Node, parts: list[Node]) -> Node:
        rows = 1 if node.target == ops.ROW_STATS else 0
        joined = parts[0] if len(parts) == 1 else self.build(aten.cat.default, parts, rows)
        return self.shaped(joined, node)

    def in_rows(self, node: Node, part: Node) -> Node:
        """What is made of a sum for a piece as [K, n]."""
        return part if node.target == ops.ROW_STATS else self.build(aten.permute.default, part, [1, 0])

    def shaped(self, rows: Node, node: Node) -> Node:
        """Numbers for all rows in the shape of a sum of the graph."""
        if node.target == ops.ROW_STATS:
            return rows
        size: list[Any] | None = sizes.of_shape(node.graph, shape_of(node))
        if size is None:
            raise NoHead("a size is no arithmetic of the inputs' sizes")
        return self.build(aten.reshape.default, rows, size)


def _is_one(source: Node) -> bool:
    """Whether it is one number, or no tensor."""
    return tensor_of(source) is None or all(equal(size, 1) for size in shape_of(source))
