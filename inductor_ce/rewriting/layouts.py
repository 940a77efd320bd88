"""Layouts: where the rows of the logits are, which is all that a loss over a DTensor has of its own."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator

import torch
from torch.fx import Node

from .. import ops
from ..common.compat.graphs import is_dtensor
from ..distributed import placements
from ..distributed.local_logits import local_part
from ..graph.builder import Builder
from ..graph.shapes import example_of, tensor_of
from ..reading.values import Label, Outside, Reading
from .arrange import fixed_labels, flat_logits
from .beside import placements_beside
from .escapes import read_by
from .groups import Group
from .rematerialise import made_before

STATISTICS = {ops.ROW_STATS, placements.whole_rows}
_OF_A_LAYOUT = {placements.on_every_rank, placements.rows_of, local_part}


def reads_elements(node: Node) -> bool:
    """Whether a reader of logits needs all of them: not for what heads make of pieces, nor to see where they
    are."""
    return node.target not in STATISTICS | _OF_A_LAYOUT | {ops.DIVERGENCE}


def other_readers(nodes: Collection[Node]) -> Iterator[Node]:
    """Who else reads elements of logits that nodes have, beside statistics and whoever is given results."""
    users = (user for node in nodes for user in node.users if node in read_by(user))
    return (user for user in users if user not in nodes and user.op != "output" and reads_elements(user))


def layout_of(build: Builder, reading: Reading, group: Group) -> Dense:
    return (Distributed if group.distributed else Dense)(build, reading, group)


class Dense:
    """Logits that are an ordinary tensor."""

    def __init__(self, build: Builder, reading: Reading, group: Group):
        self.build, self.reading, self.group = build, reading, group

    def logits(self) -> Node:
        """The logits [N, V]."""
        group = self.group
        return flat_logits(self.build, self.reading, group.logits, group.place, group.vocab_size)

    def statistics(
        self, z: Node, labels: list[Node], weights: list[Node], rows: ops.Rows, site: int
    ) -> list[Node]:
        """The rows of `row_stats`, [N], and [K, N] where they are of several labels."""
        packed = self.build(ops.ROW_STATS, z, labels, weights, rows.encode(), site=site)
        if not rows.several:
            return self.unbound(self.build(torch.unbind, packed, 0), rows)
        made = self.unbound(self.build(torch.split, packed, rows.widths), rows)
        return [
            self.build("squeeze", part, 0) if row.statistic != ops.PICKS else part
            for part, row in zip(made, rows, strict=True)
        ]

    def unbound(self, made: Node, rows: ops.Rows) -> list[Node]:
        return [self.build(operator.getitem, made, k) for k in range(len(rows.rows))]

    def brought(self, node: Node, held: Label | Outside) -> Node:
        """A tensor of the user's, such that it can stand beside the logits: on their device.

        What indexes them may be on the host, from where torch takes it.
        """
        device = example_of(self.group.logits.node).device
        if example_of(node).device == device or not example_of(node).dim():
            return node
        return self.build("to", node, device)

    def as_made(self, result: Node, node: Node) -> Node:
        """What is to take the place of a node of the user's, where that was."""
        return result

    def fixed_labels(self, column: int | None) -> Node:
        """Labels [N] that are `column` everywhere, or the number of the row if it is None."""
        return fixed_labels(self.build, self.group.logits, column)

    def whole(self, sums: Node) -> Node:
        """Sums over the vocabulary, of all of it."""
        return sums

    def total(self, rows: Node) -> Node:
        """The sum over all rows."""
        return self.build(torch.sum, rows)

    def mean(self, rows: Node, counted: Node) -> Node:
        """sum(rows) / sum(counted)"""
        return self.build(torch.div, self.total(rows), self.total(counted))

    def mean_of_all(self, rows: Node) -> Node:
        return self.build(torch.mean, rows)


class Distributed(Dense):
    """Logits that are a DTensor, and so is what is made of them."""

    def __init__(self, build: Builder, reading: Reading, group: Group):
        super().__init__(build, reading, group)
        self._source = made_before(build, reading, group.logits.node, group.place)
        self._flat: Node | None = None

    def logits(self) -> Node:
        if self._flat is None:
            self._flat = super().logits()
        return self._flat

    def statistics(
        self, z: Node, labels: list[Node], weights: list[Node], rows: ops.Rows, site: int
    ) -> list[Node]:
        made = self.build(placements.whole_rows, z, labels, weights, rows.encode(), site=site)
        return self.unbound(made, rows)

    def brought(self, node: Node, held: Label | Outside) -> Node:
        if not is_dtensor(tensor_of(node)):
            return self.build(placements.on_every_rank, node, self._source)
        where = placements_beside(self.group, held)
        return node if where is None else self.build(placements.placed, node, where)

    def as_made(self, result: Node, node: Node) -> Node:
        """Which part of it a rank has is seen by the user, unless each has a part of a sum."""
        ours, theirs = example_of(result), example_of(node)
        if not is_dtensor(ours) or not is_dtensor(theirs) or ours.placements == theirs.placements:
            return result
        if not placements.are_blocks(theirs.placements):
            return result
        return self.build(placements.placed, result, placements.numbered(theirs.placements))

    def fixed_labels(self, column: int | None) -> Node:
        if column is None:
            return self.build(placements.on_every_rank, super().fixed_labels(None), self._source)
        return self.build(placements.rows_of, self.logits(), column)

    def whole(self, sums: Node) -> Node:
        return self.build(placements.whole, sums)

    def total(self, rows: Node) -> Node:
        return self.build(placements.total, rows)

    def mean(self, rows: Node, counted: Node) -> Node:
        return self.build(placements.mean, rows, counted)

    def mean_of_all(self, rows: Node) -> Node:
        return self.mean(rows, self.build(torch.ones_like, rows))
