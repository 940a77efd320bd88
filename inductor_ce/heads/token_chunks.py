"""Token chunks: the logits of a few rows at a time, and their gradient at once.

The gradient is made in the forward for an upstream gradient of 1, and the scalar that all rows share is
applied in the backward. That there is one, and that a row needs nothing from the others, is what
`row_locality.py` proves. Where no gradient is wanted, this is the strategy "forward_only".
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from ..common.compat.distributed import ALL_GATHER, WAIT
from ..common.compat.graphs import IN_MEMORY, is_tangent
from ..graph.builder import Builder
from ..graph.shapes import example_of, shape_of
from ..graph.walk import args_of
from ..ops import DIVERGENCE
from ..ops.products import ONCE_MADE
from .between import Early, again, between, scalar_of
from .calls import narrow_args, stats_call
from .exits import Exits
from .find import Head
from .loops import Loop, weight_exits
from .packing import Packing
from .pieces import ROWS, Pieces
from .plan import Plan
from .proof import Proof
from .ranges import Range, ranges
from .read_once import Once, read_once
from .rolled import by_one_operator
from .skip import ALL, ToCompute
from .taught import Taught

aten = torch.ops.aten


class Coefficients:
    """The maxima and the coefficients of one chunk after another.

    Args:
        pieces: of the head.
        proof: about it.
        taught: what is made of the teacher's logits, if it is made for each chunk.

    Attributes:
        gathered: what ranks gave for the chunks so far, [P * K, rows of the chunk], by the node that waits
            for what they give for all rows.
        divergences: the chunks so far of each `divergence`, [1 + K + 2 S, rows of the chunk].
    """

    def __init__(self, pieces: Pieces, proof: Proof, taught: Taught | None = None):
        self.pieces, self.proof, self.build, self.taught = pieces, proof, pieces.build, taught
        self._gradients = [*pieces.head.grads, *pieces.head.divergence_grads]
        wanted = [part for node in self._gradients for part in narrow_args(node)]
        wanted += pieces.head.divergences
        statistics, late = set(pieces.head.stats), set()
        if taught is not None:
            statistics, late = statistics | taught.teacher.sums, taught.late
            wanted += taught.teacher.feeds
        found = between(statistics, wanted, proof.facts) | late  # all that must be made anew
        self._nodes = [node for node in pieces.head.product.graph.nodes if node in found]
        self.early = Early(self.build, self._nodes, proof.facts)
        self._cuts: dict[Node, Node] = {}
        self.gathered: dict[Node, list[Node]] = {}
        self.divergences: dict[Node, list[Node]] = {node: [] for node in pieces.head.divergences}

    def of(
        self, stats: dict[Node, Node], forward: dict[Node, Node], piece: Range
    ) -> dict[Node, tuple[Node, ...]]:
        """Of a chunk the `narrow_args` of gradients, of its statistics and, for divergences, its logits.

        NOTE All rows. The nodes run on statistics of all rows, of which only those of the chunk are
        filled in: whatever the views between do to the rows, it stays right, and the rest is not computed,
        as nobody reads it.
        """
        build = self.build
        self._cuts = {}
        made = {node: self._in_all_rows(part, piece) for node, part in stats.items()}
        if self.taught is not None:
            made |= {node: self._sum(node, part, piece) for node, part in self.taught.early_sums().items()}
        for node in self._nodes:
            if self.taught is not None and node in self.taught.late:
                part = self.taught.make(node, piece, made)
                if node in self.taught.teacher.sums:
                    made[node] = self._sum(node, part, piece)
            elif self.proof.facts[node].is_factor(node):
                made[node] = self.early.one(node)
            elif node.target == DIVERGENCE:
                made[node] = self._in_all_rows(self._divergence(node, forward, made, piece), piece)
            elif node.target == ALL_GATHER:
                made[node] = self._gathered(node, made, piece)
            elif node.target == WAIT:
                waited = build(WAIT, made[args_of(node)[0]])
                self.gathered.setdefault(node, []).append(waited)
                made[node] = self._in_all_rows(waited, piece)
            else:
                made[node] = again(build, node, made)
        return {node: tuple(self._narrow(node, stats, made, piece)) for node in self._gradients}

    def _narrow(
        self, node: Node, stats: dict[Node, Node], made: dict[Node, Node], piece: Range
    ) -> Iterator[Node]:
        """Pieces of the `narrow_args` of a gradient."""
        *rows, coefficients = narrow_args(node)
        for part in rows:
            if part in self._cuts:
                yield self._cuts[part]
            elif (source := _unaliased(part)) in self.divergences:
                yield self.divergences[source][-1]
            else:
                yield self._maxima(part, stats, made, piece)
        whole = made.get(coefficients, coefficients)
        yield self.pieces.counted(whole, piece, len(shape_of(whole)) - 1)

    def _divergence(
        self, node: Node, forward: dict[Node, Node], made: dict[Node, Node], piece: Range
    ) -> Node:
        """A chunk of a `divergence`, made of numbers of its rows."""
        ms, ds = ([self._once(row, made, piece) for row in rows] for rows in args_of(node)[1:3])
        self.divergences[node].append(self.pieces.divergence(node, forward, piece, ms, ds))
        return self.divergences[node][-1]

    def _once(self, row: Node, made: dict[Node, Node], piece: Range) -> Node:
        """The numbers of a chunk's rows, made once, and not for each of their entries."""
        if row not in self._cuts:
            self._cuts[row] = self.pieces.cut(made.get(row, row), piece, 0)
            self._cuts[row].meta[IN_MEMORY] = True
        return self._cuts[row]

    def _gathered(self, node: Node, made: dict[Node, Node], piece: Range) -> Node:
        """Ranks exchange the statistics of the chunk alone, contiguous, as up to torch 2.11 they must be."""
        own, *rest = args_of(node)
        part = self.pieces.cut(made[own], piece, -1)
        part = self.build(aten.clone.default, part, memory_format=torch.contiguous_format)
        return self.build(ALL_GATHER, part, *rest)

    def _maxima(self, m: Node, stats: dict[Node, Node], made: dict[Node, Node], piece: Range) -> Node:
        """Those of a chunk's rows, which in most graphs the statistics have as they are."""
        if m.target == aten.select.int and (source := args_of(m)[0]) in stats and args_of(m)[1] == 0:
            return self.build(aten.select.int, stats[source], *args_of(m)[1:])
        return self.pieces.cut(made.get(m, m), piece, 0)

    def _in_all_rows(self, part: Node, piece: Range) -> Node:
        """What a chunk has of rows [K, n] among those of all, [K, N]."""
        if self.pieces.packing is not None:
            return self.pieces.packing.in_all_rows(part, piece)
        return self.build(aten.constant_pad_nd.default, part, [piece.start, self._rows_after(piece)], 0.0)

    def _sum(self, node: Node, part: Node, piece: Range) -> Node:
        """What a chunk has of a sum for each row of the teacher, among those of all rows."""
        assert self.taught is not None
        return self.taught.shaped(self._in_all_rows(self.taught.in_rows(node, part), piece), node)

    def _rows_after(self, piece: Range) -> Any:
        n = self.pieces.n
        if isinstance(n, int):
            return n - piece.end
        return self.build(operator.sub, n, piece.end)


def _unaliased(node: Node) -> Node:
    while node.target in (aten.alias.default, aten.detach.default):
        (node,) = args_of(node)
    return node


def token_chunks(
    build: Builder,
    head: Head,
    proof: Proof,
    plan: Plan,
    loop: Loop | None = None,
    computed: ToCompute = ALL,
) -> dict[Node, Node]:
    """Make statistics and gradients chunk by chunk. Returns what stands for each `row_stats` and each exit.

    Args:
        build: makes the nodes.
        head: the head.
        proof: about it.
        plan: how many chunks, of equal size as nearly as may be, and what is kept in float32.
        loop: of which it is the next head. The weight's gradient is the last one's then.
        computed: the rows that are computed.
    """
    loop = loop or Loop(1)
    pieces = Pieces(build, head, ROWS)
    chunks = ranges(build, pieces.n, plan.pieces)
    if computed.rows is not None:
        pieces.packing = Packing(build, computed.rows, chunks, computed.looks)
    taught = None if head.teacher is None else Taught(pieces, head.teacher)
    coefficients = Coefficients(pieces, proof, taught)
    exits = Exits(pieces, plan)
    if loop.out is not None:
        exits.go_on(weight_exits(head), loop.out)
    once = read_once(head, proof.facts)
    if once is not None and computed.is_rolled:
        program = coefficients.early.given(once.program)
        parts, after = by_one_operator(pieces, chunks, exits, program, once.chain)
    else:
        parts, after = _made_in_chunks(chunks, coefficients, exits, once, loop.after)
    parts |= coefficients.gathered | coefficients.divergences
    joined = operator.itemgetter(0) if computed.is_rolled else pieces.whole
    whole = {node: joined(of_node) for node, of_node in parts.items()}
    whole |= taught.whole() if taught else {}
    if exits:
        whole = {node: build(ONCE_MADE, x, example_of(x).dtype, after) for node, x in whole.items()}
    scale = scalar_of(build, proof.factor)
    of_rows = any(not is_tangent(node) for node, _ in proof.factor)
    if not loop.is_last:
        if nodes := weight_exits(head):
            loop.out = exits.leave(nodes)
        loop.after, loop.left = after, loop.left - 1
    return whole | exits.finish(scale, of_rows)


def _made_in_chunks(
    chunks: list[Range], coefficients: Coefficients, exits: Exits, once: Once | None, after: list[Node]
) -> tuple[dict[Node, list[Node]], list[Node]]:
    """(the statistics of each chunk, by their nodes, what the last has made), one after another.

    With `once`, statistics and gradient of a chunk are made by one operator. The first begins when what is
    in `after` is made.
    """
    pieces, taught = coefficients.pieces, coefficients.taught
    head = pieces.head
    program = None if once is None else coefficients.early.given(once.program)
    parts: dict[Node, list[Node]] = {node: [] for node in head.stats}
    for piece in chunks:
        if taught is not None:
            after = taught.begin(piece, after)
        known: dict[Node, tuple[Node, ...]] = {}
        if once is not None and program is not None:
            stats, made = pieces.stats_and_gradient(piece, after, program, once.chain)
        else:
            made = pieces.forward(piece, pieces.waited(after) if head.divergences else after)
            stats = {node: pieces.stats(node, made[stats_call(node).z], piece) for node in head.stats}
            if exits or taught or head.divergences:
                known = coefficients.of(stats, made, piece)
        for node, part in stats.items():
            parts[node].append(part)
        after = [*stats.values(), *(so_far[-1] for so_far in coefficients.divergences.values())]
        if exits:
            after = exits.add(made, piece, known)
        after += taught.sums() if taught else []
    return parts, after
