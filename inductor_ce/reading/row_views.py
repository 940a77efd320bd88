"""How the rows of a value are arranged, and how to go between arrangements.

A value with the vocabulary axis may be a view of the logits: reshaped, transposed, sliced. What a view
does to the rows is a list of steps over the shape without the vocabulary axis, so that statistics taken
once over the logits themselves follow it forward, and labels follow it backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ..graph.shapes import Size, constant, equal, shape_of


@dataclass(frozen=True)
class Reshape:
    """The rows of `source` as the rows of `result`, in the same order. Axes are the vocabulary's."""

    source: Node
    source_axis: int
    result: Node
    result_axis: int | None


@dataclass(frozen=True)
class Permute:
    """Dimension i of the result is dimension order[i] of the source."""

    order: tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """Contiguous ranges: `left` and `right` rows are cut off each dimension."""

    left: tuple[int, ...]
    right: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        return not any(self.left + self.right)


@dataclass(frozen=True)
class Index:
    """Of dimension `dim`, which has `size` rows, the one `at` a place. The dimension is gone."""

    dim: int
    at: int
    size: int


RowView = Reshape | Permute | Slice | Index


def arrangement(steps: tuple[RowView, ...]) -> tuple[object, ...]:
    """What makes two arrangements of the rows alike: nothing where there are only reshapes."""
    if all(isinstance(s, Reshape) for s in steps):
        return ()
    return tuple(_sizes(s) if isinstance(s, Reshape) else s for s in steps)


def _sizes(step: Reshape) -> tuple[str, ...]:
    return tuple(map(str, row_shape(step.result, step.result_axis)))


def row_shape(node: Node, axis: int | None) -> tuple[Size, ...]:
    """The shape of `node` without its vocabulary axis, if it has one."""
    return tuple(s for i, s in enumerate(shape_of(node)) if i != axis)


def follow_axis(source: Sequence[Size], axis: int, result: Sequence[Size]) -> int | None:
    """Where a reshape puts the axis: the place in `result` with its size and as many rows before it."""
    before = math.prod(source[:axis])
    for place, size in enumerate(result):
        if equal(size, source[axis]) and equal(math.prod(result[:place]), before):
            return place
    return None


def slice_steps(index: Any, source: Sequence[Size], result: Sequence[Size], axis: int) -> Slice | None:
    """The Slice over rows that `x[index]` is: ranges with step 1 that leave the axis whole, else None."""
    found = index_steps(index, source, result, axis)
    return None if found is None or found[2] else found[1]


def index_steps(
    index: Any, source: Sequence[Size], result: Sequence[Size], axis: int
) -> tuple[int, Slice, tuple[Index, ...]] | None:
    """(the vocabulary's axis in x[index], its ranges over rows, its numbers); None if it cuts the axis."""
    pieces = index_per_dimension(index, len(source))
    if pieces is None or isinstance(pieces[axis], int):
        return None
    sizes = iter(result)
    ranged = [0 if isinstance(piece, int) else next(sizes) for piece in pieces]
    cuts = [_cut(piece, *both) for piece, *both in zip(pieces, source, ranged, strict=True)]
    if None in cuts or cuts[axis] != (0, 0):
        return None
    rows = [i for i in range(len(source)) if i != axis]
    left, right = (tuple(cuts[i][side] for i in rows) for side in (0, 1))  # type: ignore[index]
    taken = [_index(dim, pieces[i], source[i]) for dim, i in enumerate(rows) if isinstance(pieces[i], int)]
    if None in taken:
        return None
    before = sum(isinstance(piece, int) for piece in pieces[:axis])
    return axis - before, Slice(left, right), tuple(reversed(taken))  # type: ignore[arg-type]


def _cut(piece: int | slice, size: Size, result: Size) -> tuple[int, int] | None:
    """How many rows a range cuts off on either side; a number cuts none."""
    if isinstance(piece, int):
        return 0, 0
    start, removed = _start(piece, size), constant(size - result)
    if start is None or removed is None or start > removed or piece.step not in (None, 1):
        return None
    return start, removed - start


def _start(piece: slice, size: Size) -> int | None:
    start = 0 if piece.start is None else piece.start
    if not isinstance(start, int):
        return None
    if start >= 0:
        return start
    counted = constant(size + start)
    return None if counted is None else max(0, counted)


def _index(dim: int, at: int, size: Size) -> Index | None:
    number = constant(size)
    return Index(dim, at % number, number) if number is not None and -number <= at < number else None


def range_of(piece: Any, size: Any) -> tuple[int, int] | None:
    """(the first, the one behind the last) of `size` places that a slice takes one after another.

    None for anything else: a step, a bound or a size that is no number. It may take none.
    """
    if not isinstance(piece, slice) or piece.step not in (None, 1) or not isinstance(size, int):
        return None
    if not all(bound is None or isinstance(bound, int) for bound in (piece.start, piece.stop)):
        return None
    first, end, _ = piece.indices(size)
    return first, end


def index_per_dimension(index: Any, rank: int) -> list[Any] | None:
    """What `x[index]` asks of each dimension of x; None where the index adds dimensions or is a tensor."""
    items = list(index) if isinstance(index, tuple) else [index]
    ellipses = [i for i, item in enumerate(items) if item is Ellipsis]
    if len(ellipses) > 1 or not all(map(_is_basic, items)):
        return None
    missing = [slice(None)] * (rank - len(items) + len(ellipses))
    place = ellipses[0] if ellipses else len(items)
    return items[:place] + missing + items[place + 1 :]


def _is_basic(item: Any) -> bool:
    return item is Ellipsis or (isinstance(item, (int, slice)) and not isinstance(item, bool))
