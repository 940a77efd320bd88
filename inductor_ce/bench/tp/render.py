"""A result of `bench tp`, as its JSON has it, as a text table and as a picture. MB are 2**20 bytes."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..shared import bars
from ..shared.compilers import MODES
from ..shared.pictures import CUT, finish
from ..shared.pictures import bars as draw_bars
from ..shared.tables import aligned, heading, mb
from .systems import SYSTEMS
from .tasks import TITLES

HEADER = (
    *("task", "mode", "system", "ms", "spread", "ratio", "collectives", "share", "wall", "spread", "ratio"),
    *("host", "ratio", "MB", "ratio", "errors", "compile s", ""),
)
LEFT = (0, 1, 2, 15, 17)  # the columns of words
PANELS = (
    ("ratio", "GPU time / that of loss_parallel", "{:.2f}", 1.0, CUT),
    ("wall_ratio", "wall time / that of loss_parallel", "{:.2f}", 1.0, CUT),
    ("host_ms", "host time of a step, ms", "{:.1f}", 1.0, math.inf),
    (
        "extra_bytes",
        "extra memory at the peak of a rank, MB",
        "{:.0f}",
        2.0**-20,
        math.inf,
    ),
)


def table(result: dict[str, Any]) -> str:
    """Every number of every shape, what was not measured, and the bars."""
    tables = map(_shape_table, result["shapes"])
    return "\n\n".join([heading(result["environment"]), *tables, bars.table(result["bars"])])


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
        _ratio(row["ratio"]),
        f"{row['collective_ms']:.3f}",
        f"{100 * row['share']:.0f}%",
        f"{row['wall_ms']:.3f}",
        f"{100 * row['wall_spread']:.1f}%",
        _ratio(row["wall_ratio"]),
        f"{row['host_ms']:.2f}",
        _ratio(row["host_ratio"]),
        "" if row["extra_bytes"] is None else mb(row["extra_bytes"]),
        _ratio(row["memory_ratio"]),
        ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items()),
        f"{row['first_call_s']:.1f}",
        "; ".join(row["problems"] + ([] if row["ahead"] else ["the host was not ahead"])),
    )


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars for each task, mode and system, a column for each shape: three times, and memory below.

    The task that loss_parallel cannot do is compared with gathered logits.
    """
    shapes = result["shapes"]
    groups = _groups(shapes)
    width = 1 + max(5.5, 1.6 * len(groups)) * len(shapes)
    figure = Figure(figsize=(width, 3.5 * len(PANELS)), layout="constrained")
    axes = figure.subplots(len(PANELS), len(shapes), sharey="row", squeeze=False)
    for shape, column in zip(shapes, axes.T, strict=True):
        column[0].set_title(f"{shape['N']} x {shape['V']}, {shape['ranks']} ranks")
        for panel, (key, _, text, scale, cut) in zip(column, PANELS, strict=True):
            draw_bars(panel, _heights(shape, key, scale), groups, list(SYSTEMS), text, cut=cut)
    for panel, (_, label, _, _, cut) in zip(axes[:, 0], PANELS, strict=True):
        panel.set_ylabel(label + (f"\n(bars cut at {cut})" if cut < math.inf else ""))
    finish(figure, axes, result, path)


def _groups(shapes: list[dict[str, Any]]) -> list[str]:
    """Those of which there is something."""
    present = {(row["task"], row["mode"]) for shape in shapes for row in shape["rows"]}
    return [_group(task, mode) for task in TITLES for mode in MODES if (task, mode) in present]


def _group(task: str, mode: str) -> str:
    return "\n".join([*textwrap.wrap(TITLES[task], 22), mode])


def _heights(shape: dict[str, Any], key: str, scale: float) -> dict[tuple[str, str], float]:
    return {
        (_group(row["task"], row["mode"]), row["system"]): scale * row[key]
        for row in shape["rows"]
        if row[key] is not None
    }
