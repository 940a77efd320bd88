"""Rows, or columns, one range after another."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from ..graph.builder import Builder
from .extra_memory import piece_size


@dataclass(frozen=True)
class Range:
    """Rows, or columns, from `start` up to `end`: numbers, or nodes of numbers.

    Attributes:
        index: the place of this range among those of a head.
    """

    start: Any
    end: Any
    index: int = 0


def ranges(build: Builder, size: Any, pieces: int) -> list[Range]:
    """`size` cut in so many ranges, equal but for the last."""
    if isinstance(size, int):
        step = max(piece_size(size, pieces), 1)
        starts = [*range(0, size, step)] or [0]
        return [Range(start, min(start + step, size), i) for i, start in enumerate(starts)]
    part = build(operator.floordiv, size, pieces)
    first: list[Any] = [0, *(build(operator.mul, part, i) for i in range(1, pieces))]
    last = [*first[1:], size]
    return [Range(start, end, i) for i, (start, end) in enumerate(zip(first, last, strict=True))]
