"""The law by which the statistics of blocks of columns make those of the rows that they make up.

Blocks are ranks, slabs of a head, or any other split of V; `rows` says what each statistic does when its
block is moved to the maximum of the whole row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .law import Law, Move
from .rows import Rows
from .table import FIRST, MAXIMUM


def own_rows(packed: Tensor, law: Law, start: Tensor | int) -> Tensor:
    """The statistics [K, N] of some columns, with the argmax among the columns of the whole."""
    if law.first is None:
        return packed
    at = law.first
    return torch.cat([packed[:at], packed[at : at + 1] + start, packed[at + 1 :]])


def chosen(packed: Tensor, rows: Rows, wanted: Rows) -> Tensor:
    """Of the statistics `rows` those that are `wanted`."""
    if rows == wanted:
        return packed
    end = rows.first_of_several
    named = zip(packed[:end].unbind(0), rows, strict=False)
    made = torch.stack([row for row, name in named if name in wanted.rows])
    return made if end == len(rows) else torch.cat([made, packed[end:]])


def combined(
    law: Law,
    blocks: Tensor,
    counts: Tensor,
    masses: Mapping[int, Tensor] | None = None,
    held: Tensor | None = None,
) -> Tensor:
    """The statistics of whole rows, [K, N], from those of P blocks.

    Args:
        law: of the rows, with those that they combine beside: see `Rows.closed`.
        blocks: [P, K, N] or longer in K, in any order of P; argmax among the columns of the whole.
        counts: how many columns a block has, [P, N] or [P, 1].
        masses: of weights of which there is no mass among the rows: the sum of them over each block, [P, N]
            or [P, 1].
        held: the blocks without a gradient, where some flows through the others: what is no sum has none.
    """
    parts = blocks.unbind(1)
    constants = parts if held is None else held.unbind(1)
    peaks, sums = constants[:2]  # max and sumexp, which every call has
    m = peaks.amax(0)
    # No gradient of a block that holds +inf is lost where it does not count.
    infinite = peaks == -torch.inf if held is None else peaks.isinf()
    rise = torch.where(infinite, 0.0, peaks - m)
    scale = rise.exp()
    combined = []
    for k, move in enumerate(law.moves):
        block = blocks[:, k]
        if move.held == MAXIMUM:
            combined.append(m)
        elif move.held == FIRST:
            combined.append(_first_largest(peaks, sums, constants[k]))
        else:
            beside = _beside(move, parts, counts, masses or {})
            combined.append(_moved(block, move, rise, scale, beside).sum(0))
    made = torch.stack(combined)
    return torch.cat([made, blocks[:, len(combined) :][:, : law.several].sum(0)]) if law.several else made


def _beside(
    move: Move, parts: Sequence[Tensor], counts: Tensor, masses: Mapping[int, Tensor]
) -> Tensor | None:
    """What meets the rise of the maximum in a row."""
    if move.is_beside_count:
        return counts
    if move.mass is not None:
        return masses[move.mass]
    return None if move.beside is None else parts[move.beside]


def _moved(block: Tensor, move: Move, rise: Tensor, scale: Tensor, beside: Tensor | None) -> Tensor:
    """The sum of each block with its differences taken from the maximum of the whole row."""
    if move.order is None:
        return block if beside is None else block + beside * rise
    factor = scale if move.order == 1 else (move.order * rise).exp()
    moved = block * factor
    # Where the rise is such that its exp vanishes, that comes first: times what is beside it may be infinite.
    return moved if beside is None else moved + beside * (rise * factor)


def _first_largest(peaks: Tensor, sums: Tensor, columns: Tensor) -> Tensor:
    """The first column with the maximum, or with NaN, which is the largest: of it a maximum need not tell."""
    nan = peaks.isnan() | (sums.isnan() & (peaks != torch.inf))
    largest = torch.where(nan.any(0), nan, peaks == peaks.amax(0))
    return torch.where(largest, columns, torch.inf).amin(0)
