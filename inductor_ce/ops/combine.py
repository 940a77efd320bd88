"""The law by which the statistics of blocks of columns make those of the rows that they make up.

Blocks are ranks, slabs of a head, or any other split of V; `rows` says what each statistic does when its
block is moved to the maximum of the whole row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .rows import ARGMAX, FIRST, MASS, MAX, MAXIMUM, SUMEXP, Row, Rows


def own_rows(packed: Tensor, rows: Rows, start: Tensor | int) -> Tensor:
    """The statistics [K, N] of some columns, with the argmax among the columns of the whole."""
    if ARGMAX not in rows:
        return packed
    at = rows.index(ARGMAX)
    return torch.cat([packed[:at], packed[at : at + 1] + start, packed[at + 1 :]])


def chosen(packed: Tensor, rows: Rows, wanted: Rows) -> Tensor:
    """Of the statistics `rows` those that are `wanted`."""
    if rows == wanted:
        return packed
    return torch.stack([row for row, name in zip(packed.unbind(0), rows, strict=True) if name in wanted.rows])


def combined(
    rows: Rows, blocks: Tensor, counts: Tensor, masses: Mapping[int, Tensor] | None = None
) -> Tensor:
    """The statistics of whole rows, [K, N], from those of P blocks.

    Args:
        rows: which, with those that they combine beside: see `Rows.closed`.
        blocks: [P, K, N] or longer in K, in any order of P; argmax among the columns of the whole.
        counts: how many columns a block has, [P, N] or [P, 1].
        masses: of weights of which `rows` has no mass: the sum of them over each block, [P, N] or [P, 1].
    """
    of_row = dict(zip(rows, blocks.unbind(1), strict=False))
    of_row |= {Row(MASS, j): mass for j, mass in (masses or {}).items()}
    peaks, sums = of_row[Row(MAX)], of_row[Row(SUMEXP)]
    m = peaks.amax(0)
    rise = torch.where(peaks == -torch.inf, 0.0, peaks - m)
    scale = rise.exp()
    combined = []
    for k, row in enumerate(rows):
        block = blocks[:, k]
        if row.statistic.held == MAXIMUM:
            combined.append(m)
        elif row.statistic.held == FIRST:
            combined.append(_first_largest(peaks, sums, block))
        else:
            beside = None if row.beside is None else of_row[row.beside]
            beside = counts if row.is_beside_count else beside
            combined.append(_moved(block, row, rise, scale, beside).sum(0))
    return torch.stack(combined)


def _moved(block: Tensor, row: Row, rise: Tensor, scale: Tensor, beside: Tensor | None) -> Tensor:
    """The sum of each block with its differences taken from the maximum of the whole row."""
    if beside is not None:
        block = block + beside * rise
    return block * scale if row.statistic.has_exp else block


def _first_largest(peaks: Tensor, sums: Tensor, columns: Tensor) -> Tensor:
    """The first column with the maximum, or with NaN, which is the largest: of it a maximum need not tell."""
    nan = peaks.isnan() | (sums.isnan() & (peaks != torch.inf))
    largest = torch.where(nan.any(0), nan, peaks == peaks.amax(0))
    return torch.where(largest, columns, torch.inf).amin(0)
