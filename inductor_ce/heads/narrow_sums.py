"""The gradient of the weight, summed over chunks in 16 bits: see ops/products.py."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..graph.shapes import example_of
from ..ops.products import COMPLETE, MOST_FREQUENT, PRODUCT_BUT
from .nodes import empty, in_place
from .pieces import CAST, Pieces
from .ranges import Range

aten = torch.ops.aten

OFTEN = 128  # rows that are summed in float32


class NarrowSum:
    """What stands beside the sum: the entries at the labels, and the rows of the most frequent of these.

    Args:
        pieces: of the head.
        rows: what the gradient is multiplied with, [N, M].
        width: M.
    """

    def __init__(self, pieces: Pieces, rows: Node, width: Any):
        self._build, self._pieces, self._rows = pieces.build, pieces, rows
        packing = pieces.packing
        self._labels = [
            label if packing is None else packing.all_counted(label, -1) for label in pieces.head.labels()
        ]
        count = min(OFTEN, pieces.head.v)
        self._columns = self._build(MOST_FREQUENT, self._labels, pieces.head.v, count)
        self._often = empty(self._build, [count, width], torch.float32, example_of(rows).device)
        self._entries: list[Node] = []

    def add(self, out: Node, dz: Node, piece: Range, first: bool, last: bool) -> tuple[Node, Node]:
        """(`out` [V, M] and what a chunk adds, dz to read thereafter): dz is its gradient of the logits.

        Whoever is the `last` to read it may leave it as it becomes.
        """
        build = self._build
        made = in_place(
            build,
            PRODUCT_BUT,
            {"out": out, "often": self._often, "dz": dz},
            b=self._pieces.rows(self._rows, piece, []),
            labels=[self._pieces.cut(label, piece, 0) for label in self._labels],
            columns=self._columns,
            accumulate=not first,
            restore=not last,
            **self._pieces.limit(piece),
        )
        entries, out, self._often, dz = (build(operator.getitem, made, i) for i in range(4))
        self._entries.append(entries)
        return out, dz

    def complete(self, out: Node, scaled: Callable[[Node], Node]) -> Node:
        """`out`, which is scaled by what all gradients share, and what stands beside it, which is not yet."""
        build = self._build
        entries = self._pieces.in_order(build(aten.cat.default, self._entries, 1), 1)
        entries = build(CAST, entries, torch.float32)
        made = in_place(
            build,
            COMPLETE,
            {"out": out},
            labels=self._labels,
            entries=scaled(entries),
            rows=self._rows,
            columns=self._columns,
            often=scaled(self._often),
        )
        return build(operator.getitem, made, 1)
