"""A result of `bench ce`, as its JSON has it, as a text table and as a picture. MB are 2**20 bytes."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .losses import LOSSES
from .systems import BASELINE, SYSTEMS

HEADER = ("loss", "system", "ms", "spread", "ratio", "MB", "loss error", "dz error", "compile s", "")
LEFT = (0, 1, 9)  # the columns of words
BAR_WIDTH = 0.8
CUT = 1.5  # bars of time end here, so that those below 1 can be told apart


def table(result: dict[str, Any]) -> str:
    """Every number of every shape, and below them what was not measured."""
    return "\n\n".join([heading(result["environment"]), *map(_shape_table, result["shapes"])])


def heading(where: dict[str, Any]) -> str:
    """Where and when, on one line."""
    versions = f"torch {where['torch']}, triton {where['triton']}, commit {where['commit']}"
    return f"{where['gpu']}, {versions}{', with changes' if where['dirty'] else ''}, {where['date']}"


def _shape_table(shape: dict[str, Any]) -> str:
    lines = [_shape_heading(shape), *aligned([HEADER, *map(_cells, shape["rows"])], LEFT)]
    skipped: dict[tuple[str, str], list[str]] = {}
    for each in shape["not_measured"]:
        skipped.setdefault((each["system"], each["reason"]), []).append(each["loss"])
    lines += [f"{name} ({', '.join(losses)}): {reason}" for (name, reason), losses in skipped.items()]
    return "\n".join(lines)


def _shape_heading(shape: dict[str, Any]) -> str:
    copy, read = (shape[f"{key}_bytes_per_s"] / 1e12 for key in ("copy", "read"))
    return (
        f"{shape['N']} x {shape['V']}: logits {mb(shape['logits_bytes'])} MB; "
        f"2 passes {shape['two_pass_ms']:.3f} ms, 3 passes {shape['three_pass_ms']:.3f} ms "
        f"(copy {copy:.2f} TB/s, read {read:.2f} TB/s)"
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    notes = ["writes over the logits"] * row["overwrites_logits"] + row["problems"]
    return (
        row["loss"],
        row["system"],
        f"{row['ms']:.3f}",
        f"{100 * row['spread']:.1f}%",
        "" if row["ratio"] is None else f"{row['ratio']:.3f}",
        mb(row["extra_bytes"]),
        f"{row['loss_error']:.1e}",
        f"{row['dz_error']:.1e}",
        f"{row['first_call_s']:.1f}",
        "; ".join(notes),
    )


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


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars for each loss and system, a column for each shape: time above, memory below."""
    shapes = result["shapes"]
    figure = Figure(figsize=(1 + 4.5 * len(shapes), 7), layout="constrained")
    axes = figure.subplots(2, len(shapes), sharey="row", squeeze=False)
    for shape, (upper, lower) in zip(shapes, axes.T, strict=True):
        upper.set_title(f"{shape['N']} x {shape['V']}")
        titles = [LOSSES[name].title.replace(", ", "\n") for name in _losses(shape)]
        bars(upper, _heights(shape, "ratio"), titles, list(SYSTEMS), "{:.2f}", cut=CUT)
        bars(lower, _heights(shape, "extra_bytes", 2.0**-20), titles, list(SYSTEMS), "{:.0f}")
        _limits(upper, shape)
        lower.axhline(shape["logits_bytes"] / 2**20, color="black", linestyle=":", linewidth=1)
    axes[0, 0].set_ylabel(f"time / time of {BASELINE}\n(bars cut at {CUT}; dashed: limit of three passes)")
    axes[1, 0].set_ylabel("extra memory at the peak, MB\n(dotted: the size of the logits)")
    finish(figure, axes, result, path)


def finish(figure: Figure, axes: Any, result: dict[str, Any], path: Path) -> None:
    """The legend, where and when the numbers were made, and the file."""
    handles = {h.get_label(): h for a in axes[0] for h in a.containers}
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=len(handles))
    where = result["environment"]
    figure.supxlabel(f"{where['gpu']}, torch {where['torch']}, {where['date'][:10]}", fontsize="small")
    figure.savefig(path, dpi=150)


def _losses(shape: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["loss"] for row in shape["rows"]))


def _heights(shape: dict[str, Any], key: str, scale: float = 1.0) -> dict[tuple[str, str], float]:
    return {
        (LOSSES[row["loss"]].title.replace(", ", "\n"), row["system"]): scale * row[key]
        for row in shape["rows"]
        if row[key] is not None
    }


def bars(
    axes: Axes,
    heights: dict[tuple[str, str], float],
    groups: list[str],
    systems: list[str],
    text: str,
    cut: float = math.inf,
) -> None:
    """The bars of one quantity by group and system; a system that did not run leaves a gap in its place."""
    present = [name for name in systems if any(system == name for _, system in heights)]
    width = BAR_WIDTH / max(1, len(present))
    for k, name in enumerate(present):
        places = [i for i, group in enumerate(groups) if (group, name) in heights]
        values = [heights[groups[i], name] for i in places]
        drawn = axes.bar(
            [i + (k + 0.5) * width - BAR_WIDTH / 2 for i in places],
            [min(value, cut) for value in values],
            width,
            label=name,
            color=f"C{systems.index(name)}",
        )
        axes.bar_label(drawn, [text.format(value) for value in values], fontsize=6, rotation=90, padding=2)
    axes.margins(y=0.15)
    axes.set_xticks(range(len(groups)), groups, fontsize=8)


def _limits(axes: Axes, shape: dict[str, Any]) -> None:
    """The time of three passes beside the bars of each loss, in units of the baseline's."""
    for i, loss in enumerate(_losses(shape)):
        for row in shape["rows"]:
            if row["loss"] == loss and row["system"] == BASELINE:
                ends = (i - BAR_WIDTH / 2, i + BAR_WIDTH / 2)
                axes.hlines(
                    shape["three_pass_ms"] / row["ms"], *ends, color="black", linestyle="--", linewidth=1
                )
