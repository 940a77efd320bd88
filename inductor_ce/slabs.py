"""Vocabulary slabs: a few columns of the logits at a time, in the forward and again in the backward.

The statistics of slabs combine by the monoid, as those of ranks do. The backward knows every upstream
gradient, so whatever the loss is, it works; it costs one more product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from . import ops
from .builder import Builder
from .chunks import ranges
from .exits import Exit
from .heads import Head
from .nodes import grad_call, stats_call
from .pieces import COLUMNS, Pieces, Range
from .shards import combined


def vocab_slabs(build: Builder, head: Head, slabs: int, wide_sum: bool) -> dict[Node, Node]:
    """Make statistics and gradients slab by slab. Returns what stands for each `row_stats` and each exit.

    Args:
        build: makes the nodes.
        head: the head.
        slabs: how many, of equal size as nearly as may be.
        wide_sum: whether 16-bit sums are made in float32.
    """
    pieces = Pieces(build, head, COLUMNS)
    gradients = head.gradients()
    forward = [node for node in head.wide if node not in gradients]
    columns = ranges(build, head.v, slabs)
    parts: dict[Node, list[Node]] = {node: [] for node in head.stats}
    after: list[Node] = []
    for piece in columns:
        made = pieces.wide(pieces.logits(piece, after), piece, forward)
        for node in head.stats:
            rows = _with_masses(_rows(node))
            parts[node].append(pieces.stats(node, made[stats_call(node).z], piece, rows))
        after = [of_node[-1] for of_node in parts.values()]
    whole = {node: _whole(build, node, of_node, columns) for node, of_node in parts.items()}
    return whole | {e.node: e.finish(None) for e in _backward(pieces, forward, columns, wide_sum)}


def _backward(pieces: Pieces, forward: list[Node], columns: list[Range], wide_sum: bool) -> list[Exit]:
    head = pieces.head
    exits = [Exit(pieces, node, wide_sum) for node in head.exits]
    if not exits:
        return []
    coefficients = {node: (grad_call(node).m, grad_call(node).coefficients) for node in head.grads}
    after = [c for _, c in coefficients.values()]
    for i, piece in enumerate(columns):
        made = pieces.wide(pieces.logits(piece, after), piece, forward)
        made = pieces.wide_gradients(made, piece, coefficients)
        after = [e.add(made[e.source], piece, first=i == 0) for e in exits]
    return exits


def _whole(build: Builder, node: Node, parts: list[Node], columns: list[Range]) -> Node:
    """The statistics of whole rows from those of slabs."""
    rows = _rows(node)
    of_slab = _with_masses(rows)
    which = ",".join(of_slab)
    wanted = [k for k, row in enumerate(of_slab) if row in rows]

    def combine(*blocks: Tensor) -> Tensor:
        packed = torch.stack(
            [_to_whole(b, of_slab, piece.start) for b, piece in zip(blocks, columns, strict=True)]
        )
        counts = torch.cat([packed.new_full((1, 1), piece.end - piece.start) for piece in columns])
        named = dict(zip(of_slab, packed.unbind(1), strict=True))
        whole = combined(which, packed, named, counts)
        return whole if len(wanted) == len(of_slab) else torch.stack([whole[k] for k in wanted])

    return build.traced(combine, parts)


def _rows(node: Node) -> list[str]:
    call = stats_call(node)
    return ops.parse(call.which, len(call.labels), len(call.weights))


def _with_masses(rows: list[str]) -> list[str]:
    """Rows that combine: a sum over weights needs the sum of the weights."""
    found: list[str] = []
    for row in rows:
        found.append(row)
        mass = row.replace(ops.DOT, ops.MASS)
        if row.startswith(f"{ops.DOT}:") and mass not in rows:
            found.append(mass)
    return found


def _to_whole(block: Tensor, rows: list[str], start: int) -> Tensor:
    """The statistics of a slab, with the argmax among all columns."""
    if ops.ARGMAX not in rows:
        return block
    at = rows.index(ops.ARGMAX)
    return torch.cat([block[:at], block[at : at + 1] + start, block[at + 1 :]])
