"""The law by which the statistics of blocks of columns make those of the rows that they make up."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from . import operators


def own_rows(packed: Tensor, which: str, start: Tensor | int) -> Tensor:
    """The statistics of some columns, with the argmax among the columns of the whole."""
    rows = which.split(",")
    if operators.ARGMAX not in rows:
        return packed
    at = rows.index(operators.ARGMAX)
    return torch.cat([packed[:at], packed[at : at + 1] + start, packed[at + 1 :]])


def with_masses(which: str, known: Container[int] = ()) -> str:
    """The rows that combine: `which`, with a mass:j to each dot:j but those of which it is known."""
    rows = which.split(",")
    result = []
    for row in rows:
        result.append(row)
        name, j = operators.weighed(row) or ("", 0)
        mass = f"{operators.MASS}:{j}"
        if name == operators.DOT and mass not in rows and j not in known:
            result.append(mass)
    return ",".join(result)


def chosen(packed: Tensor, which: str, wanted: str) -> Tensor:
    """Of the statistics `which` those that are `wanted`."""
    if which == wanted:
        return packed
    names = wanted.split(",")
    rows = zip(packed.unbind(0), which.split(","), strict=True)
    return torch.stack([row for row, name in rows if name in names])


def combined(which: str, blocks: Tensor, named: dict[str, Tensor], counts: Tensor) -> Tensor:
    """The monoid, over the first dimension of rows [P, K, N].

    `named` holds [P, N] by name, or [P, 1] of what is the same for all rows; `counts` are the columns.
    """
    peaks, sums = named[operators.MAX], named[operators.SUMEXP]
    m = peaks.amax(0)
    gap = torch.where(peaks == -torch.inf, 0.0, peaks - m)
    scale = gap.exp()
    rows = []
    for k, name in enumerate(which.split(",")):
        block = blocks[:, k]  # there are as many rows "pick" as labels
        if name == operators.MAX:
            rows.append(m)
            continue
        if name == operators.ARGMAX:
            rows.append(_first_largest(peaks, sums, block))
            continue
        if name == operators.SUM:
            block = block + counts * gap
        elif name == operators.SUMEXP or name.startswith(operators.EXPDOT):
            block = block * scale
        elif name == operators.SUMEXPZ:
            block = (block + gap * sums) * scale
        elif name.startswith(operators.DOT):
            block = block + named[name.replace(operators.DOT, operators.MASS)] * gap
        rows.append(block.sum(0))
    return torch.stack(rows)


def _first_largest(peaks: Tensor, sums: Tensor, columns: Tensor) -> Tensor:
    """The first column with the maximum, or with NaN, which is the largest: of it a maximum need not tell."""
    nan = peaks.isnan() | (sums.isnan() & (peaks != torch.inf))
    largest = torch.where(nan.any(0), nan, peaks == peaks.amax(0))
    return torch.where(largest, columns, torch.inf).amin(0)
