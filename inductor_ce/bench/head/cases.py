"""The cases of a record: what each is called, and which belong together."""

from __future__ import annotations

from typing import Any

from ..shared.compilers import DEFAULT
from ..shared.labels import Labels

Case = dict[str, Any]


def mode_of(case: Case) -> str:
    return case.get("mode", DEFAULT)  # records of earlier versions do not say it


def title(case: Case) -> str:
    """Name and activations, and labels and mode where they are not the usual ones."""
    words = [case["name"], case["activations"]]
    if case.get("ignored") is not None:
        words.append(str(Labels(case["ignored"], case["pattern"])))
    if mode_of(case) != DEFAULT:
        words.append(mode_of(case))
    return ", ".join(words)


def ms_of(system: str, case: Case | None) -> float | None:
    rows = case["rows"] if case else []
    return next((row["ms"] for row in rows if row["system"] == system), None)


def with_none_ignored(case: Case, cases: list[Case]) -> Case | None:
    """The case that differs in this alone."""
    same = [each for each in cases if _but_for_labels(each) == _but_for_labels(case)]
    return next((each for each in same if each.get("ignored") == 0), None)


def over_shares(cases: list[Case]) -> list[Case]:
    """Those that differ from others in the share of their labels that is ignored, and these."""
    return [
        case
        for case in cases
        if case.get("ignored") is not None
        and any(_but_for_labels(o) == _but_for_labels(case) and o["ignored"] for o in cases)
        and with_none_ignored(case, cases)
    ]


def _but_for_labels(case: Case) -> tuple[str, ...]:
    return case["name"], case["activations"], mode_of(case)
