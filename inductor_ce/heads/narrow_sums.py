"""The gradient of the weight, summed over chunks in 16 bits: see ops/products.py."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Node

from ..graph.shapes import example_of
from ..ops.counted import FREQUENT_ROWS
from ..ops.gemm import ALIGNED
from ..ops.products import COMPLETE, MOST_FREQUENT, ONCE_MADE, PRODUCT_BUT
from .nodes import empty, in_place
from .pieces import Pieces
from .ranges import Range

aten = torch.ops.aten

OFTEN = 128  # rows that are summed in float32


class NarrowSum:
    """What stands beside the sum: the entries at the labels, and the rows of the most frequent of these.

    Args:
        pieces: of the head.
        rows: what the gradient is multiplied with, [N, M].
    """

    def __init__(self, pieces: Pieces, rows: Node):
        self._build, self._pieces, self._rows = pieces.build, pieces, rows
        packing = pieces.packing
        self._labels = [
            label if packing is None else packing.all_counted(label, -1) for label in pieces.head.labels()
        ]
        self._often = min(OFTEN, pieces.head.v)
        self._columns = self._build(MOST_FREQUENT, self._labels, pieces.head.v, self._often)
        self._kept: Node | None = None

    def add(self, out: Node, dz: Node, piece: Range, first: bool, last: bool) -> tuple[Node, Node]:
        """(`out` [V, M] and what a chunk adds, dz to read thereafter): dz is its gradient of the logits.

        Whoever is the `last` to read it may leave it as it becomes.
        """
        build = self._build
        made = in_place(
            build,
            PRODUCT_BUT,
            {"out": out, "kept": self._room(dz) if self._kept is None else self._kept, "dz": dz},
            b=self._pieces.rows(self._rows, piece, []),
            labels=[self._pieces.cut(label, piece, 0) for label in self._labels],
            columns=self._columns,
            start=piece.start,
            accumulate=not first,
            restore=not last,
            **self._pieces.limit(piece),
        )
        out, self._kept, dz = (build(operator.getitem, made, i) for i in range(1, 4))
        return out, dz

    def _room(self, dz: Node) -> Node:
        """For what is kept of all rows, each of which begins where libraries are fast."""
        width = -(-(self._often + len(self._labels)) // ALIGNED) * ALIGNED
        return empty(self._build, [self._pieces.n, width], example_of(dz).dtype, example_of(dz).device)

    def complete(self, out: Node, scaled: Callable[[Node], Node]) -> Node:
        """`out`, which is scaled by what all gradients share, and what stands beside it, which is not yet."""
        build = self._build
        made = in_place(
            build,
            COMPLETE,
            {"out": out},
            labels=self._labels,
            entries=scaled(self._entries()),
            rows=self._rows,
            columns=self._columns,
            often=scaled(self._frequent_rows()),
        )
        return build(operator.getitem, made, 1)

    def _columns_kept(self, start: int, end: int) -> Node:
        assert self._kept is not None
        return self._build(aten.slice.Tensor, self._kept, 1, start, end)

    def _entries(self) -> Node:
        """Those at the labels, [N, K] in float32, in the order of the rows, 0 where rows do not count."""
        kept = self._columns_kept(self._often, self._often + len(self._labels))
        if self._pieces.packing is not None:
            return self._pieces.packing.put_back(kept, torch.float32)
        return self._build(ONCE_MADE, kept, torch.float32, [])

    def _frequent_rows(self) -> Node:
        """The rows of the whole gradient that are those of the most frequent labels, in float32."""
        packing = self._pieces.packing
        order = [None, None] if packing is None else packing.order()
        given = (self._columns_kept(0, self._often), self._rows, *order)
        return self._build(FREQUENT_ROWS, *given, **({} if packing is None else packing.all_limit()))
