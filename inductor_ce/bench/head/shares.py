"""Time over the share of labels that are ignored, as a text table and as panels of a picture."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from ..shared.compilers import BASELINE, DEFAULT, OURS
from ..shared.labels import PATTERNS
from ..shared.measure import over
from ..shared.tables import aligned
from .bars import most_of_all
from .cases import Case, mode_of, ms_of, title, with_none_ignored

HEADER = (
    *("over shares of ignored labels", f"{OURS}, ms", "of none ignored", "at most"),
    *(f"{BASELINE}, ms", "of none ignored", "ours of it"),
)
STYLES = dict(zip(PATTERNS, ("o-", "s--"), strict=True))


def table(cases: list[Case]) -> str:
    """Ours and plain compile beside what each takes where all labels count."""
    return "\n".join(aligned([HEADER, *(_cells(case, cases) for case in cases)], (0,)))


def _cells(case: Case, cases: list[Case]) -> tuple[str, ...]:
    all_count = with_none_ignored(case, cases)
    ours, plain = ms_of(OURS, case), ms_of(BASELINE, case)
    return (
        title(case),
        _text("{:.2f}", ours),
        _text("{:.3f}", over(ours, ms_of(OURS, all_count))),
        f"{most_of_all(case):.3f}" if case["ignored"] else "",
        _text("{:.2f}", plain),
        _text("{:.3f}", over(plain, ms_of(BASELINE, all_count))),
        _text("{:.3f}", over(ours, plain)),
    )


def _text(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def panel(axes: Axes, cases: list[Case]) -> None:
    """Of one shape and kind of activations: a line for each system, mode and pattern, and the ideal ones."""
    first = cases[0]
    axes.set_title(f"{first['name']}: {first['N']} x {first['V']} x {first['D']}", fontsize=9)
    for k, mode in enumerate(dict.fromkeys(map(mode_of, cases))):
        in_mode = [case for case in cases if mode_of(case) == mode]
        _lines(axes, in_mode, OURS, f"C{k}", "" if mode == DEFAULT else f", {mode}")
        _lines(axes, in_mode, BASELINE, f"C{k}", "" if mode == DEFAULT else f", {mode}", alpha=0.35)
        whole = next((ms_of(OURS, case) for case in in_mode if not case["ignored"]), None)
        if whole is not None:
            label = None if k else "in proportion to the labels left"
            axes.plot([0, 1], [whole, 0], ":", color=f"C{k}", linewidth=1, label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)
    axes.set_xlabel("share of the labels that is ignored", fontsize=8)
    axes.set_ylabel("forward and backward, ms", fontsize=8)
    axes.legend(fontsize=7, frameon=False)


def _lines(axes: Axes, cases: list[Case], system: str, color: str, mode: str, **how: Any) -> None:
    for pattern, style in STYLES.items():
        these = [case for case in cases if case["pattern"] in ("", pattern)]
        points = sorted((c["about"]["ignored"], ms) for c in these if (ms := ms_of(system, c)) is not None)
        if len(points) > 1:
            label = f"{system}, {pattern}{mode}"
            axes.plot(*zip(*points, strict=True), style, color=color, label=label, markersize=4, **how)
