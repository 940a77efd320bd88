"""Records as text. MB are 2**20 bytes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


def heading(where: dict[str, Any]) -> str:
    """Where and when, on one line."""
    versions = f"torch {where['torch']}, triton {where['triton']}, commit {where['commit']}"
    return f"{where['gpu']}, {versions}{', with changes' if where['dirty'] else ''}, {where['date']}"


def mb(size: float) -> str:
    return f"{size / 2**20:.0f}"


def aligned(lines: Sequence[tuple[str, ...]], left: Collection[int]) -> list[str]:
    """The cells in columns, those of `left` to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
