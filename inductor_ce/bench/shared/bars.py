"""What a benchmark must show, and whether it does: numbers that have limits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .tables import aligned


@dataclass(frozen=True)
class Bar:
    """One number that must be at most `limit`; None where it could not be had."""

    what: str
    value: float | None
    limit: float

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.value <= self.limit


def told(case: str, bars: Iterable[Bar]) -> list[dict[str, Any]]:
    """Of a case, for JSON."""
    return [{"case": case, **asdict(bar), "met": bar.met} for bar in bars]


def table(found: list[dict[str, Any]]) -> str:
    lines = [("", "case", "what must be", "value", "at most")]
    words = {True: "met", False: "MISSED", None: "not measured"}
    for bar in found:
        value = "" if bar["value"] is None else f"{bar['value']:.4g}"
        lines.append((words[bar["met"]], bar["case"], bar["what"], value, f"{bar['limit']:.4g}"))
    return "\n".join(aligned(lines, (0, 1, 2)))
