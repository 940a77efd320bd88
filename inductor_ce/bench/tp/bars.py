"""What the losses over ranks must show on four GPUs, and whether a result shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..shared.bars import Bar, told
from ..shared.compilers import DEFAULT, MODES, OURS
from .systems import BASELINE

RANKS = 4
CASES = [(task, mode) for task in ("loss", "linear") for mode in MODES]
LIMITS = {
    "ratio": ("GPU time of", dict(zip(CASES, (0.27, 0.28, 0.90, 0.90), strict=True))),
    "memory_ratio": ("memory of", {("linear", DEFAULT): 0.30}),
    "wall_ratio": ("wall time of", dict.fromkeys(CASES[2:], 1.00)),
    "beyond": ("ms of the host beyond", dict.fromkeys(CASES, 1.0)),
}

Row = dict[str, Any]


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar of every shape, for JSON."""
    return [bar for shape in result["shapes"] for bar in _bars_of(shape)]


def _bars_of(shape: dict[str, Any]) -> Iterator[dict[str, Any]]:
    rows = {(row["task"], row["mode"], row["system"]): row for row in shape["rows"]}
    for task, mode in CASES:
        found = [rows.get((task, mode, system)) for system in (OURS, BASELINE)]
        if any(found):
            yield from told(_title(shape, task, mode), _bars(task, mode, *found))


def _title(shape: dict[str, Any], task: str, mode: str) -> str:
    here = "" if shape["ranks"] == RANKS else f" (on {shape['ranks']} ranks; limits are of {RANKS})"
    return f"{shape['N']} x {shape['V']}, {task}, {mode}{here}"


def _bars(task: str, mode: str, ours: Row | None, beside: Row | None) -> Iterator[Bar]:
    values = _values(ours, beside) if ours and beside else {}
    for key, (what, limits) in LIMITS.items():
        if limit := limits.get((task, mode)):
            yield Bar(f"{what} loss_parallel's", values.get(key), limit)


def _values(ours: Row, beside: Row) -> dict[str, float | None]:
    """The time of GPUs counts where hosts were ahead of them."""
    return {
        "ratio": ours["ratio"] if ours["ahead"] and beside["ahead"] else None,
        "memory_ratio": ours["memory_ratio"],
        "wall_ratio": ours["wall_ratio"],
        "beyond": ours["host_ms"] - beside["host_ms"],
    }
