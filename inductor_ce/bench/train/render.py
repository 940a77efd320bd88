"""A result of `bench train`, as its JSON has it, as a text table and as a picture. MB are 2**20 bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..shared.compilers import BASELINE
from ..shared.pictures import CUT, bars, finish
from ..shared.tables import aligned, heading, mb
from .systems import SYSTEMS

HEADER = (
    "system",
    "ms",
    "spread",
    "ratio",
    "host ms",
    "MB",
    "ratio",
    "loss",
    "gradient",
    "logits",
    "first s",
)
LEFT = (0, 9)


def table(result: dict[str, Any]) -> str:
    """Every number of every model, and below them what profiles say, and what was not measured."""
    cases = {case["model"]: case for case in result["cases"]}
    return "\n\n".join([heading(result["environment"]), *(_case(case, cases) for case in result["cases"])])


def _case(case: dict[str, Any], cases: dict[str, dict[str, Any]]) -> str:
    size = f"{case['B']} x {case['S']} tokens, V = {case['V']}, logits {mb(case['logits_bytes'])} MB"
    lines = [f"{case['model']}: {size}", *aligned([HEADER, *map(_cells, case["rows"])], LEFT)]
    lines += _saved(case, cases.get(case.get("like", "")))
    lines += [_profile(row["system"], row["profile"]) for row in case["rows"] if "profile" in row]
    return "\n".join([*lines, *(f"{each['system']}: {each['reason']}" for each in case["not_measured"])])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["system"],
        f"{row['ms']:.1f}",
        f"{100 * row['spread']:.1f}%",
        f"{row['ratio']:.3f}" if "ratio" in row else "",
        f"{row['host_ms']:.1f}",
        mb(row["peak_bytes"]),
        f"{row['peak_ratio']:.3f}" if "peak_ratio" in row else "",
        f"{row['loss']:.5f}",
        f"{row['gradient_difference']:.1e}" if "gradient_difference" in row else "",
        row["logits"],
        f"{row['first_call_s']:.1f}",
    )


def _saved(case: dict[str, Any], like: dict[str, Any] | None) -> list[str]:
    """What ignored labels save of a step, beside their share of the head where a profile tells its time."""
    lines = []
    rows = {row["system"]: row for row in like["rows"]} if like else {}
    for row in (row for row in case["rows"] if row["system"] in rows):
        whole = rows[row["system"]]
        line = f"{row['system']}: {whole['ms'] - row['ms']:.1f} ms less than where no label is ignored"
        head_us = whole.get("profile", {}).get("head_us")
        if head_us is not None:
            share = case["ignored"]
            line += f"; {100 * share:g} % of the head there are {share * head_us / 1e3:.1f} ms"
        lines.append(line)
    return lines


def _profile(system: str, found: dict[str, Any]) -> str:
    """In a line."""
    line = f"{system}, profiled:"
    if found["idle_share"] is not None:
        line += f" the GPU idles {100 * found['idle_share']:.2f} % of a step;"
    if found["first_of_head"] is None:
        return f"{line} no kernel of our head"
    return (
        f"{line} {found['gap_before_head_us']:.0f} us at most before the head, "
        f"{found['gap_in_head_us']:.0f} us within it; "
        f"it takes {found['head_us'] / 1e3:.1f} ms and begins with {found['first_of_head']}"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars for each model and system: time above, memory below."""
    cases = [case for case in result["cases"] if case["rows"]]
    names = [f"{case['model']}\n{case['B']} x {case['S']} tokens" for case in cases]
    figure = Figure(figsize=(max(9, 2 + 3 * len(cases)), 7), layout="constrained")
    axes = figure.subplots(2, 1, squeeze=False)
    for (axis,), key, text, cut in zip(
        axes, ("ratio", "peak_bytes"), ("{:.2f}", "{:.0f}"), (CUT, 1e9), strict=True
    ):
        scale = 2.0**-20 if key == "peak_bytes" else 1.0
        heights = {
            (name, row["system"]): scale * row[key]
            for name, case in zip(names, cases, strict=True)
            for row in case["rows"]
            if key in row
        }
        bars(axis, heights, names, list(SYSTEMS), text, cut=cut)
    axes[0, 0].set_ylabel(f"time of a step / that of {BASELINE}")
    axes[1, 0].set_ylabel("memory at the peak, MB")
    finish(figure, axes, result, path)
