"""The sides of a divergence, and the pieces of tensors that they may be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch.fx import Node

from ..graph.shapes import constant, shape_of, tensor_of
from . import spellings
from .row_views import RowView, Slice
from .values import Logits, LossValue, Reading, RowValue


@dataclass(frozen=True)
class Side:
    """Rows of logits, arranged by `steps`; no gradient flows to them where they are `detached`."""

    logits: Logits
    steps: tuple[RowView, ...]
    detached: bool


def place_in(known: list[Any], each: Any) -> int:
    """The place of something among others of its kind, to which it is added."""
    if each not in known:
        known.append(each)
    return known.index(each)


def moves(side: Side) -> bool:
    """Whether a gradient is wanted of a side."""
    example = tensor_of(side.logits.node)
    return example is not None and example.requires_grad and not side.detached


class Piece(NamedTuple):
    """Rows `left` to size - `right` of a dimension of a tensor."""

    source: Node
    dim: int
    left: int
    right: int

    def cut(self, axis: int) -> Slice:
        rows = [d for d in range(len(shape_of(self.source))) if d != axis]
        left, right = (tuple(n if d == self.dim else 0 for d in rows) for n in (self.left, self.right))
        return Slice(left, right)


def piece_of(node: Node) -> Piece | None:
    """What a node is of a tensor that torch.split or torch.chunk cuts into pieces."""
    spelled = spellings.read(node)
    index = None if spelled is None or spelled[0].name != "getitem" else spelled[1].get("index")
    if spelled is None or not isinstance(index, int) or not isinstance(spelled[1]["input"], Node):
        return None
    cutting = spelled[1]["input"]
    cut = spellings.read(cutting)
    if cut is None or cut[0].name not in ("split", "chunk") or tensor_of(cut[1].get("input")) is None:
        return None
    source, dim = cut[1]["input"], cut[1].get("dim", 0)
    pieces = cutting.meta.get("example_value", cutting.meta.get("val"))
    if not isinstance(dim, int) or not isinstance(pieces, (list, tuple)):
        return None
    dim %= len(shape_of(source))
    sizes = [constant(piece.shape[dim]) for piece in pieces]
    if None in sizes or not -len(sizes) <= index < len(sizes):
        return None
    index %= len(sizes)
    return Piece(source, dim, sum(sizes[:index]), sum(sizes[index + 1 :]))  # type: ignore[arg-type]


def of_wholes(sides: list[Side], reading: Reading) -> tuple[Side, ...]:
    """Sides, those that are halves of one tensor as slices of it: its normalisers are made in one sweep.

    Where there are losses of the halves themselves, they have the normalisers.
    """
    halves = {side: piece for side in sides if (piece := _half_of(side, reading)) is not None}
    sources = [piece.source for piece in halves.values()]
    return tuple(
        _as_slice(side, halves[side], reading)
        if side in halves and sources.count(halves[side].source) > 1
        else side
        for side in sides
    )


def _half_of(side: Side, reading: Reading) -> Piece | None:
    piece = piece_of(side.logits.node)
    if piece is None or piece.dim == side.logits.axis:
        return None
    own = any(
        isinstance(value, (RowValue, LossValue)) and value.logits == side.logits
        for value in reading.values.values()
    )
    size = constant(shape_of(piece.source)[piece.dim])
    return None if own or size is None or 2 * (piece.left + piece.right) > size else piece


def _as_slice(side: Side, piece: Piece, reading: Reading) -> Side:
    z = side.logits
    version = reading.timeline.version(piece.source, reading.timeline.position[z.node])
    whole = replace(z, node=piece.source, version=version)
    return replace(side, logits=whole, steps=(piece.cut(z.axis), *side.steps))
