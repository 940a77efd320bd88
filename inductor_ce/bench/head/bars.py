"""What the head must show, and whether a result shows it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..shared.bars import Bar, told
from ..shared.compilers import BASELINE, DEFAULT, GRAPHS, OURS
from ..shared.measure import over
from .cases import Case, mode_of, ms_of, title, with_none_ignored
from .inputs import MLM
from .systems import CCE, CCE_BUDGET, CCE_EXACT, CCE_ROOM, SYSTEMS

TIME_AND_MEMORY = {
    "gemma": (1.00, 0.27),
    "gemma2": (1.00, 0.27),
    "llama": (1.00, 0.27),
    "qwen": (0.97, 0.14),
}  # of plain compile's
OF_CCE_EXACT = 0.3
OF_PRODUCT, FORWARD_BYTES = 1.08, 600 * 2**20
ERROR_RATIO = 1.15
HOST_MS = 0.5

# Rows that do not count: of the time with all labels, of that of an earlier version, and of plain compile's
# by the share of labels ignored and the mode.
OF_ROWS_LEFT, AND_OF_ALL = 1.08, 0.03
OF_BEFORE = 1.01
OF_PLAIN = {(0.75, DEFAULT): 0.30, (0.75, GRAPHS): 0.36}
OF_PLAIN_MLM = {(0.85, DEFAULT): 0.35}


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar of every case, for JSON."""
    return [bar for case in result["cases"] for bar in told(title(case), _bars_of(case, result))]


def _bars_of(case: Case, result: dict[str, Any]) -> Iterator[Bar]:
    rows = {row["system"]: row for row in case["rows"]}
    ignored = case.get("ignored")
    if ignored is None and mode_of(case) == DEFAULT:
        yield from _usual_bars(case, rows)
    if ignored:
        yield from _share_bars(case, result, rows)
    elif "before" in result:
        of_before = over(ms_of(OURS, case), _ms_before(case, result))
        yield Bar(f"time of that before, {result['before']['record']}", of_before, OF_BEFORE)
    errors = [*_error_bars(rows)]
    yield from errors if ignored is None else sorted(errors, key=_value, reverse=True)[:1]


def _share_bars(case: Case, result: dict[str, Any], rows: dict[str, dict[str, Any]]) -> Iterator[Bar]:
    all_count = ms_of(OURS, with_none_ignored(case, result["cases"]))
    yield Bar("time of that with none ignored", over(ms_of(OURS, case), all_count), most_of_all(case))
    limits = OF_PLAIN_MLM if case["name"] == MLM else OF_PLAIN
    if limit := limits.get((case["ignored"], mode_of(case))):
        yield Bar("time of plain compile's", _get(rows, OURS, "ratio"), limit)


def most_of_all(case: Case) -> float:
    """What a case may take of the time that it takes where all labels count."""
    return OF_ROWS_LEFT * (1 - case["about"]["ignored"]) + AND_OF_ALL


def _ms_before(case: Case, result: dict[str, Any]) -> float | None:
    """None where it was measured elsewhere."""
    before, here = result["before"], result["environment"]
    same = all(before[key] == here[key] for key in ("gpu", "torch"))
    return before["ms"].get(title(case)) if same else None


def earlier(path: Path) -> dict[str, Any]:
    """What an earlier record says of ours, where no share of the labels is ignored."""
    result = json.loads(path.read_text())
    cases = [case for case in result["cases"] if not case.get("ignored")]
    where = {key: result["environment"][key] for key in ("commit", "gpu", "torch")}
    return {"record": path.name, **where, "ms": {title(case): ms_of(OURS, case) for case in cases}}


def _usual_bars(case: Case, rows: dict[str, dict[str, Any]]) -> Iterator[Bar]:
    if case["name"] in TIME_AND_MEMORY:
        time, memory = TIME_AND_MEMORY[case["name"]]
        yield Bar("time of plain compile's", _get(rows, OURS, "ratio"), time)
        yield Bar("memory of plain compile's", _get(rows, OURS, "memory_ratio"), memory)
    yield from _host_bars(rows)
    ours, exact = _get(rows, CCE_BUDGET, "ms"), _get(rows, CCE_EXACT, "ms")
    yield Bar(f"{CCE_BUDGET}: time of {CCE_EXACT}'s", over(ours, exact), OF_CCE_EXACT)
    ours, peak = _get(rows, CCE_BUDGET, "extra_bytes"), _get(rows, CCE, "extra_bytes")
    yield Bar(f"{CCE_BUDGET}: memory of {CCE}'s", over(ours, peak), CCE_ROOM)
    forward = {row["system"]: row for row in case["forward"]}
    yield Bar("forward alone: time of the product's", _get(forward, OURS, "of_product"), OF_PRODUCT)
    yield Bar("forward alone: bytes", _get(forward, OURS, "extra_bytes"), FORWARD_BYTES)


def _host_bars(rows: dict[str, dict[str, Any]]) -> Iterator[Bar]:
    """None where it was not looked at, as in older records."""
    ours, plain = (rows.get(name, {}).get("host_ms") for name in (OURS, BASELINE))
    if ours is not None and plain is not None:
        yield Bar("ms of the host beyond plain compile's", ours - plain, HOST_MS)


def _error_bars(rows: dict[str, dict[str, Any]]) -> Iterator[Bar]:
    """Of every error, the worst ratio among all of ours: whatever the plan picks, or a user forces."""
    ours = [rows[name] for name in rows if SYSTEMS[name].kind == "ours" and rows[name]["error_ratio"]]
    for kind in ours[0]["error_ratio"] if ours else ():
        ratios = {
            row["system"]: row["error_ratio"][kind] for row in ours if row["error_ratio"][kind] is not None
        }
        found = [
            Bar(f"error of plain compile's, {kind}, worst in {name}", ratio, ERROR_RATIO)
            for name, ratio in ratios.items()
        ]
        if found:
            yield max(found, key=_value)


def _value(bar: Bar) -> tuple[bool, float]:
    """A key by which NaN is larger than any number."""
    value = -math.inf if bar.value is None else bar.value
    return math.isnan(value), value


def _get(rows: dict[str, dict[str, Any]], system: str, key: str) -> float | None:
    return rows[system][key] if system in rows else None
