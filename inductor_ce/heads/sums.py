"""Gradients that are sums of what no product reads, such as that of a temperature that is learnt.

    z = s x, of a factor s for all rows or one for each       ds = sum_i dz_i x_i, over the rows that share it
    z = s x + b, of a bias behind a scale, [V]                db = sum of dz over the rows

They are summed in the sweep that makes what is summed, which is nowhere in memory.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ..graph.shapes import equal, example_of, shape_of
from . import sizes
from .find import NoHead, source_of_exit
from .gradients import result_dtype, scaled
from .kinds import ROW_SUMS, summed_dims, vocab_axis
from .pieces import CAST, COLUMNS, ROWS, Pieces
from .ranges import Range

aten = torch.ops.aten


class Sum:
    """One such gradient.

    Args:
        pieces: of the head.
        node: the sum over the whole: over all rows, or over the classes and some rows, all or none.
    """

    def __init__(self, pieces: Pieces, node: Node):
        self.pieces, self.build, self.node = pieces, pieces.build, node
        self.source = source_of_exit(node, pieces.head)
        self._over = COLUMNS if pieces.head.exits[node] == ROW_SUMS else ROWS
        self._parts: list[Node] = []

    def add(self, source: Node, piece: Range) -> Node:
        """Take in a piece of what is summed, [n, V] or [N, v]. Returns what is then made."""
        if self.pieces.packing is not None:
            source = self.pieces.packing.cleared(source, piece)
        dtype = torch.promote_types(example_of(source).dtype, torch.float32)
        part = self.build(aten.sum.dim_IntList, source, [self._over], dtype=dtype)
        if self._parts and self.pieces.dim == self._over:
            part = self.build(aten.add.Tensor, self._parts.pop(), part)
        self._parts.append(part)
        return part

    def finish(self, scale: Node | None, of_rows: bool = False) -> Node:
        """The gradient of the whole, times a scalar, as `node` was: see `scaled`."""
        build = self.build
        sums = self._parts[0] if len(self._parts) == 1 else build(aten.cat.default, self._parts)
        if self._over == COLUMNS:
            sums = self.pieces.in_order(sums, 0)
        if scale is not None:
            sums = scaled(build, sums, scale, of_rows)
        made = self._of_classes(sums) if self._over == ROWS else self._of_rows(sums)
        dtype = result_dtype(self.node)
        return made if example_of(made).dtype == dtype else build(CAST, made, dtype)

    def _of_classes(self, sums: Node) -> Node:
        """The sums of classes, [V], in the shape of the gradient."""
        v = self.pieces.head.v
        return self.build(aten.reshape.default, sums, [v if equal(s, v) else 1 for s in shape_of(self.node)])

    def _of_rows(self, sums: Node) -> Node:
        """The sums of rows, [N], summed over the rows that share a factor."""
        build, source = self.build, self.source
        rank, axis = len(shape_of(source)), vocab_axis(source)
        dims, keepdim = summed_dims(self.node)
        if len(dims) == rank:
            return build(aten.reshape.default, build(aten.sum.default, sums), [1] * rank if keepdim else [])
        whole = [1 if i == axis else s for i, s in enumerate(shape_of(source))]
        size = sizes.of_shape(self.node.graph, whole)
        if size is None:
            raise NoHead("the number of rows that share a factor is no arithmetic of the inputs' sizes")
        return build(aten.sum.dim_IntList, build(aten.reshape.default, sums, size), sorted(dims), keepdim)
