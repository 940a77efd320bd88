"""A result of `bench head` as text tables and as a picture. MB are 2**20 bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from ..shared.compilers import OURS
from ..shared.tables import aligned, heading, mb
from .systems import CCE_BUDGET, SYSTEMS

HEADER = (
    *("system", "ms", "spread", "ratio", "MB", "beyond gradients", "ratio", "loss error"),
    *("dh error", "ratio", "dW error", "ratio", "worst row dh", "dW", "compile s", ""),
)
FORWARD_HEADER = ("forward alone", "ms", "spread", "of product", "MB", "loss error", "compile s", "")
KIND_COLORS = {"baseline": "black", "peer": "C1", "ours": "C0"}


def table(result: dict[str, Any]) -> str:
    """Every number of every case, what was not measured, and the bars."""
    return "\n\n".join(
        [heading(result["environment"]), *map(_case_table, result["cases"]), _bar_table(result["bars"])]
    )


def _case_table(case: dict[str, Any]) -> str:
    lines = [_case_heading(case)]
    lines += aligned([HEADER, *map(_cells, case["rows"])], (0, len(HEADER) - 1))
    if case["forward"]:
        cells = map(_forward_cells, case["forward"])
        lines += ["", *aligned([FORWARD_HEADER, *cells], (0, len(FORWARD_HEADER) - 1))]
    return "\n".join(lines + [f"{each['system']}: {each['reason']}" for each in case["not_measured"]])


def _case_heading(case: dict[str, Any]) -> str:
    about = case["about"]
    return (
        f"{case['name']}, {case['N']} x {case['V']} x {case['D']}, {case['activations']}: "
        f"loss {about['loss']:.3f}, mean of the largest probability {about['mean_max_probability']:.4f}; "
        f"logits {mb(case['logits_bytes'])} MB, gradients {mb(case['gradient_bytes'])} MB; "
        f"product {case['product_ms']:.2f} ms, three {case['products_ms']:.2f} ms"
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    ratios = row["error_ratio"] or {}
    return (
        row["system"],
        f"{row['ms']:.2f}",
        f"{100 * row['spread']:.1f}%",
        _ratio(row["ratio"]),
        mb(row["extra_bytes"]),
        mb(row["beyond_gradients"]),
        _ratio(row["memory_ratio"]),
        f"{row['loss_error']:.1e}",
        f"{row['dh']['norm']:.1e}",
        _ratio(ratios.get("dh norm")),
        f"{row['dW']['norm']:.1e}",
        _ratio(ratios.get("dW norm")),
        _ratio(ratios.get("dh worst_row")),
        _ratio(ratios.get("dW worst_row")),
        f"{row['first_call_s']:.1f}",
        _remarks(row),
    )


def _forward_cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["system"],
        f"{row['ms']:.2f}",
        f"{100 * row['spread']:.1f}%",
        _ratio(row["of_product"]),
        mb(row["extra_bytes"]),
        f"{row['loss_error']:.1e}",
        f"{row['first_call_s']:.1f}",
        _remarks(row),
    )


def _remarks(row: dict[str, Any]) -> str:
    strategies = [f"{key} {count}" for key, count in row["counted"].items() if key not in ("sites", "misses")]
    return "; ".join(strategies + row["notes"] + row["problems"])


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _bar_table(found: list[dict[str, Any]]) -> str:
    lines = [("", "case", "what must be", "value", "at most")]
    words = {True: "met", False: "MISSED", None: "not measured"}
    for bar in found:
        value = "" if bar["value"] is None else f"{bar['value']:.4g}"
        lines.append((words[bar["met"]], bar["case"], bar["what"], value, f"{bar['limit']:.4g}"))
    return "\n".join(aligned(lines, (0, 1, 2)))


def plot(result: dict[str, Any], path: Path) -> None:
    """Time over memory beyond the gradients, a panel a case: ours a curve over budgets, peers points."""
    cases = result["cases"]
    columns = list(dict.fromkeys(case["name"] for case in cases))
    kinds = list(dict.fromkeys(case["activations"] for case in cases))
    figure = Figure(figsize=(1 + 5 * len(columns), 0.5 + 4 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), len(columns), squeeze=False)
    for panel in axes.flat:
        panel.set_visible(False)
    for case in cases:
        _panel(axes[kinds.index(case["activations"])][columns.index(case["name"])], case)
    where = result["environment"]
    figure.supxlabel(f"{where['gpu']}, torch {where['torch']}, {where['date'][:10]}", fontsize="small")
    figure.savefig(path, dpi=150)


def _panel(axes: Axes, case: dict[str, Any]) -> None:
    axes.set_visible(True)
    axes.set_title(
        f"{case['name']}: {case['N']} x {case['V']} x {case['D']}, {case['activations']}", fontsize=9
    )
    axes.axhline(case["products_ms"], color="gray", linestyle=":", linewidth=1, label="three bare products")
    curve = sorted(_point(row) for row in case["rows"] if _on_curve(row["system"]))
    axes.plot(*zip(*curve, strict=True) if curve else ((), ()), "o-", color="C0", label=f"{OURS}, by budget")
    for row in case["rows"]:
        if row["system"] != OURS and not _on_curve(row["system"]):
            _mark(axes, row, "s" if SYSTEMS[row["system"]].kind == "ours" else "D")
        elif row["system"] == OURS:
            _mark(axes, row, "*")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.tick_params(which="both", labelsize=7)
    axes.set_xlabel("peak memory beyond the gradients, MB", fontsize=8)
    axes.set_ylabel("forward and backward, ms", fontsize=8)
    axes.margins(0.12)
    axes.legend(fontsize=7, frameon=False)


def _on_curve(system: str) -> bool:
    return SYSTEMS[system].budget is not None or system == CCE_BUDGET


def _point(row: dict[str, Any]) -> tuple[float, float]:
    """(MB, ms); on a logarithmic axis what is nothing stands at 1 MB."""
    return max(1.0, row["beyond_gradients"] / 2**20), row["ms"]


def _mark(axes: Axes, row: dict[str, Any], marker: str) -> None:
    x, y = _point(row)
    color = KIND_COLORS[SYSTEMS[row["system"]].kind]
    axes.plot([x], [y], marker, color=color, markersize=10 if marker == "*" else 5)
    axes.annotate(row["system"], (x, y), xytext=(4, 4), textcoords="offset points", fontsize=6, color=color)
