"""Vocabulary slabs: a few columns of the logits at a time, in the forward and again in the backward.

The statistics of slabs combine by one law, as those of ranks do. The backward knows every upstream
gradient, so whatever the loss is, it works; it costs one more product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.builder import Builder
from ..ops.combine import chosen, combined, own_rows
from .calls import narrow_args, stats_call
from .exits import Exits
from .find import Head
from .pieces import COLUMNS, Pieces
from .plan import Plan
from .ranges import Range, ranges


def vocab_slabs(build: Builder, head: Head, plan: Plan) -> dict[Node, Node]:
    """Make statistics and gradients slab by slab. Returns what stands for each `row_stats` and each exit.

    Args:
        build: makes the nodes.
        head: the head.
        plan: how many slabs, of equal size as nearly as may be, and what is summed in float32.
    """
    pieces = Pieces(build, head, COLUMNS)
    columns = ranges(build, head.v, plan.pieces)
    parts: dict[Node, list[Node]] = {node: [] for node in head.stats}
    after: list[Node] = []
    for piece in columns:
        made = pieces.forward(piece, after)
        for node in head.stats:
            call = stats_call(node)
            parts[node].append(pieces.stats(node, made[call.z], piece, call.rows.closed()))
        after = [of_node[-1] for of_node in parts.values()]
    whole = {node: _whole(build, node, of_node, columns) for node, of_node in parts.items()}
    return whole | _backward(pieces, columns, plan)


def _backward(pieces: Pieces, columns: list[Range], plan: Plan) -> dict[Node, Node]:
    head = pieces.head
    exits = Exits(pieces, plan)
    if not exits:
        return {}
    narrow = {node: tuple(narrow_args(node)) for node in head.grads}
    after = [coefficients for *_, coefficients in narrow.values()]
    for piece in columns:
        made = pieces.forward(piece, after)
        after = exits.add(made, piece, narrow)
    return exits.finish(None)


def _whole(build: Builder, node: Node, parts: list[Node], columns: list[Range]) -> Node:
    """The statistics of whole rows from those of slabs."""
    wanted = stats_call(node).rows
    rows = wanted.closed()
    law = rows.law()

    def combine(*blocks: Tensor) -> Tensor:
        owned = [own_rows(b, law, piece.start) for b, piece in zip(blocks, columns, strict=True)]
        packed = torch.stack(owned)
        counts = torch.cat([packed.new_full((1, 1), piece.end - piece.start) for piece in columns])
        return chosen(combined(law, packed, counts), rows, wanted)

    return build.traced(combine, parts)
