"""The gradient of the weight, summed over chunks in 16 bits: see ops/label_products.py."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import torch
from torch.fx import Node

from ..graph.shapes import example_of
from ..ops.chunk_memory import width_of_kept
from ..ops.counted import FREQUENT_ROWS
from ..ops.label_products import COMPLETE, MOST_FREQUENT, PRODUCT_BUT
from ..ops.products import ONCE_MADE
from .nodes import empty, in_place
from .pieces import Pieces
from .ranges import Range

aten = torch.ops.aten

OFTEN = 128  # rows that are summed in float32


class NarrowSum:
    """What stands beside the sum: the entries at the labels, and the rows of the most frequent of these.

    Args:
        pieces: of the head.

    Attributes:
        head_labels: the labels, of all rows.
        often: how many rows are made beside it.
    """

    def __init__(self, pieces: Pieces):
        self._build, self._pieces = pieces.build, pieces
        packing = pieces.packing
        labels = pieces.head.labels()
        self.head_labels, self.often = labels, min(OFTEN, pieces.head.v)
        self._labels = labels if packing is None else [packing.all_counted(y, -1) for y in labels]
        frequent = self._build(MOST_FREQUENT, self._labels, pieces.head.v, self.often)
        self._columns, self._runs = (self._build(operator.getitem, frequent, i) for i in range(2))
        self._rows: dict[Node, Node] = {}
        self._kept: dict[Node, Node] = {}
        self._made: dict[Node, Node] = {}

    def is_made(self, product: Node, rows: Node, kept: Node, often: Node, runs: Node) -> None:
        """What `add` keeps of all pieces, the rows of the most frequent labels, and where those are."""
        self._rows[product], self._kept[product], self._made[product] = rows, kept, often
        self._runs = runs

    def add(
        self, product: Node, rows: Node, out: Node, dz: Node, piece: Range, begun: bool, last: bool
    ) -> tuple[Node, Node]:
        """(`out` [V, M] and what a chunk adds, dz to read thereafter): dz is its gradient of the logits.

        Args:
            product: of the graph, of dz and of `rows`, [N, M]; one for each side that shares the weight.
            begun: whether there is anything in `out`.
            last: whether nobody reads dz thereafter: it may be left as it becomes.
        """
        build = self._build
        made = in_place(
            build,
            PRODUCT_BUT,
            {"out": out, "kept": self._kept.get(product) or self._room(dz), "dz": dz},
            b=self._pieces.rows(rows, piece, []),
            labels=[self._pieces.cut(label, piece, 0) for label in self._labels],
            columns=self._columns,
            start=piece.start,
            accumulate=begun,
            restore=not last,
            **self._pieces.limit(piece),
        )
        self._rows[product] = rows
        out, self._kept[product], dz = (build(operator.getitem, made, i) for i in range(1, 4))
        return out, dz

    def _room(self, dz: Node) -> Node:
        """For what is kept of all rows, each of which begins where libraries are fast."""
        width = width_of_kept(self.often, len(self._labels))
        return empty(self._build, [self._pieces.n, width], example_of(dz).dtype, example_of(dz).device)

    def complete(self, out: Node, scaled: Callable[[Node], Node]) -> Node:
        """`out`, which is scaled by what all gradients share, and what stands beside it, which is not yet."""
        build = self._build
        made = in_place(
            build,
            COMPLETE,
            {"out": out},
            runs=self._runs,
            entries=scaled(self._joined([*map(self._entries, self._kept)])),
            rows=self._joined([*self._rows.values()]),
            often=scaled(functools.reduce(self._sum, map(self._frequent_rows, self._kept))),
        )
        return build(operator.getitem, made, 1)

    def _joined(self, parts: list[Node]) -> Node:
        """What the products have of their rows, those of one product after those of another."""
        return parts[0] if len(parts) == 1 else self._build(aten.cat.default, parts)

    def _sum(self, a: Node, b: Node) -> Node:
        return self._build(aten.add.Tensor, a, b)

    def _columns_kept(self, product: Node, start: int, end: int) -> Node:
        return self._build(aten.slice.Tensor, self._kept[product], 1, start, end)

    def _entries(self, product: Node) -> Node:
        """Those at the labels, [N, K] in float32, in the order of the rows, 0 where rows do not count."""
        kept = self._columns_kept(product, self.often, self.often + len(self._labels))
        if self._pieces.packing is not None:
            return self._pieces.packing.put_back(kept, torch.float32)
        return self._build(ONCE_MADE, kept, torch.float32, [])

    def _frequent_rows(self, product: Node) -> Node:
        """The rows of the whole gradient that are those of the most frequent labels, in float32."""
        if product in self._made:
            return self._made[product]
        packing = self._pieces.packing
        order = [None, None] if packing is None else packing.order()
        given = (self._columns_kept(product, 0, self.often), self._rows[product], *order)
        return self._build(FREQUENT_ROWS, *given, **({} if packing is None else packing.all_limit()))
