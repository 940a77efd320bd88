"""What the head must show, and whether a result shows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..shared.compilers import OURS
from .systems import CCE, CCE_BUDGET, CCE_EXACT, CCE_ROOM, SYSTEMS

TIME_AND_MEMORY = {"gemma": (1.00, 0.27), "llama": (1.00, 0.27), "qwen": (0.97, 0.14)}  # of plain compile's
OF_CCE_EXACT = 0.3
OF_PRODUCT, FORWARD_BYTES = 1.08, 600 * 2**20
ERROR_RATIO = 1.15


@dataclass(frozen=True)
class Bar:
    """One number that must be at most `limit`; None where it could not be had."""

    what: str
    value: float | None
    limit: float

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.value <= self.limit


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar of every case, for JSON."""
    return [
        {"case": f"{case['name']}, {case['activations']}", **asdict(bar), "met": bar.met}
        for case in result["cases"]
        for bar in _bars_of(case)
    ]


def _bars_of(case: dict[str, Any]) -> Iterator[Bar]:
    rows = {row["system"]: row for row in case["rows"]}
    if case["name"] in TIME_AND_MEMORY:
        time, memory = TIME_AND_MEMORY[case["name"]]
        yield Bar("time of plain compile's", _get(rows, OURS, "ratio"), time)
        yield Bar("memory of plain compile's", _get(rows, OURS, "memory_ratio"), memory)
    ours, exact = _get(rows, CCE_BUDGET, "ms"), _get(rows, CCE_EXACT, "ms")
    yield Bar(f"{CCE_BUDGET}: time of {CCE_EXACT}'s", _over(ours, exact), OF_CCE_EXACT)
    ours, peak = _get(rows, CCE_BUDGET, "extra_bytes"), _get(rows, CCE, "extra_bytes")
    yield Bar(f"{CCE_BUDGET}: memory of {CCE}'s", _over(ours, peak), CCE_ROOM)
    forward = {row["system"]: row for row in case["forward"]}
    yield Bar("forward alone: time of the product's", _get(forward, OURS, "of_product"), OF_PRODUCT)
    yield Bar("forward alone: bytes", _get(forward, OURS, "extra_bytes"), FORWARD_BYTES)
    yield from _error_bars(rows)


def _error_bars(rows: dict[str, dict[str, Any]]) -> Iterator[Bar]:
    """Of every error, the worst ratio among all of ours: whatever the plan picks, or a user forces."""
    ours = [rows[name] for name in rows if SYSTEMS[name].kind == "ours" and rows[name]["error_ratio"]]
    for kind in ours[0]["error_ratio"] if ours else ():
        ratios = {
            row["system"]: row["error_ratio"][kind] for row in ours if row["error_ratio"][kind] is not None
        }
        worst = max(ratios, key=_nan_first(ratios), default=None)
        if worst is not None:
            yield Bar(f"error of plain compile's, {kind}, worst in {worst}", ratios[worst], ERROR_RATIO)


def _nan_first(ratios: dict[str, float]) -> Callable[[str], tuple[bool, float]]:
    """A key by which NaN is larger than any number."""
    return lambda name: (math.isnan(ratios[name]), ratios[name])


def _get(rows: dict[str, dict[str, Any]], system: str, key: str) -> float | None:
    return rows[system][key] if system in rows else None


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
