"""A result of `bench tp`, as its JSON has it, as a text table and as a picture. MB are 2**20 bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..shared.pictures import CUT, bars, finish
from ..shared.tables import aligned, heading, mb
from .systems import BASELINE, MODES, SYSTEMS
from .tasks import TASKS

HEADER = (
    "task",
    "mode",
    "system",
    "ms",
    "spread",
    "ratio",
    "collectives",
    "share",
    "MB",
    "errors",
    "compile s",
    "",
)
LEFT = (0, 1, 2, 9, 11)  # the columns of words


def table(result: dict[str, Any]) -> str:
    """Every number of every shape, and below them what was not measured."""
    return "\n\n".join([heading(result["environment"]), *map(_shape_table, result["shapes"])])


def _shape_table(shape: dict[str, Any]) -> str:
    title = (
        f"{shape['N']} x {shape['V']} over {shape['ranks']} ranks: "
        f"logits {mb(shape['logits_bytes'])} MB in all; "
        f"all-gather of statistics {shape['all_gather_ms']:.3f} ms by itself"
    )
    lines = [title, *aligned([HEADER, *map(_cells, shape["rows"])], LEFT)]
    lines += [f"{e['system']} ({e['task']}, {e['mode']}): {e['reason']}" for e in shape["not_measured"]]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["task"],
        row["mode"],
        row["system"],
        f"{row['ms']:.3f}",
        f"{100 * row['spread']:.1f}%",
        "" if row["ratio"] is None else f"{row['ratio']:.3f}",
        f"{row['collective_ms']:.3f}",
        f"{100 * row['collective_ms'] / row['ms']:.0f}%",
        "" if row["extra_bytes"] is None else mb(row["extra_bytes"]),
        ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items()),
        f"{row['first_call_s']:.1f}",
        "; ".join(row["problems"]),
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars for each task, mode and system, a column for each shape: time above, memory below."""
    shapes = result["shapes"]
    figure = Figure(figsize=(1 + 5.5 * len(shapes), 7), layout="constrained")
    axes = figure.subplots(2, len(shapes), sharey="row", squeeze=False)
    groups = [f"{task.title}\n{mode}" for task in TASKS.values() for mode in MODES]
    for shape, (upper, lower) in zip(shapes, axes.T, strict=True):
        upper.set_title(f"{shape['N']} x {shape['V']}, {shape['ranks']} ranks")
        bars(upper, _heights(shape, "ratio"), groups, list(SYSTEMS), "{:.2f}", cut=CUT)
        bars(lower, _heights(shape, "extra_bytes", 2.0**-20), groups, list(SYSTEMS), "{:.0f}")
    axes[0, 0].set_ylabel(f"time / time of {BASELINE}\n(bars cut at {CUT})")
    axes[1, 0].set_ylabel("extra memory at the peak of a rank, MB\n(not known of CUDA graphs)")
    finish(figure, axes, result, path)


def _heights(shape: dict[str, Any], key: str, scale: float = 1.0) -> dict[tuple[str, str], float]:
    return {
        (f"{TASKS[row['task']].title}\n{row['mode']}", row["system"]): scale * row[key]
        for row in shape["rows"]
        if row[key] is not None
    }
