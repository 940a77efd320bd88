"""A result of `bench ce`, as its JSON has it, as a text table and as a picture. MB are 2**20 bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..shared.compilers import BASELINE
from ..shared.losses import LOSSES
from ..shared.pictures import BAR_WIDTH, CUT, bars, finish
from ..shared.tables import aligned, heading, mb
from .systems import SYSTEMS

HEADER = ("loss", "system", "ms", "spread", "ratio", "MB", "loss error", "dz error", "compile s", "")
LEFT = (0, 1, 9)  # the columns of words


def table(result: dict[str, Any]) -> str:
    """Every number of every shape, and below them what was not measured."""
    return "\n\n".join([heading(result["environment"]), *map(_shape_table, result["shapes"])])


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


def _losses(shape: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["loss"] for row in shape["rows"]))


def _heights(shape: dict[str, Any], key: str, scale: float = 1.0) -> dict[tuple[str, str], float]:
    return {
        (LOSSES[row["loss"]].title.replace(", ", "\n"), row["system"]): scale * row[key]
        for row in shape["rows"]
        if row[key] is not None
    }


def _limits(axes: Axes, shape: dict[str, Any]) -> None:
    """The time of three passes beside the bars of each loss, in units of the baseline's."""
    for i, loss in enumerate(_losses(shape)):
        for row in shape["rows"]:
            if row["loss"] == loss and row["system"] == BASELINE:
                ends = (i - BAR_WIDTH / 2, i + BAR_WIDTH / 2)
                axes.hlines(
                    shape["three_pass_ms"] / row["ms"], *ends, color="black", linestyle="--", linewidth=1
                )
