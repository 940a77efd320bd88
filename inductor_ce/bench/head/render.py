"""A result of `bench head` as text tables and as a picture. MB are 2**20 bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from ..shared import bars
from ..shared.compilers import DEFAULT, OURS
from ..shared.tables import aligned, heading, mb
from . import shares
from .cases import Case, mode_of, over_shares, title
from .systems import CCE_BUDGET, SYSTEMS

HEADER = (
    *("system", "ms", "spread", "ratio", "host", "wall", "MB", "beyond gradients", "ratio", "loss error"),
    *("dh error", "ratio", "dW error", "ratio", "worst row dh", "dW", "compile s", ""),
)
FORWARD_HEADER = ("forward alone", "ms", "spread", "of product", "MB", "loss error", "compile s", "")
KIND_COLORS = {"baseline": "black", "peer": "C1", "ours": "C0"}


def table(result: dict[str, Any]) -> str:
    """Every number of every case, what was not measured, and the bars."""
    several = over_shares(result["cases"])
    tables = [*map(_case_table, result["cases"]), *([shares.table(several)] if several else [])]
    return "\n\n".join([heading(result["environment"]), *tables, bars.table(result["bars"])])


def _case_table(case: dict[str, Any]) -> str:
    lines = [_case_heading(case)]
    lines += aligned([HEADER, *map(_cells, case["rows"])], (0, len(HEADER) - 1))
    if case["forward"]:
        cells = map(_forward_cells, case["forward"])
        lines += ["", *aligned([FORWARD_HEADER, *cells], (0, len(FORWARD_HEADER) - 1))]
    return "\n".join(lines + [f"{each['system']}: {each['reason']}" for each in case["not_measured"]])


def _case_heading(case: dict[str, Any]) -> str:
    about = case["about"]
    name, _, kind = title(case).partition(", ")
    return (
        f"{name}, {case['N']} x {case['V']} x {case['D']}, {kind}: "
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
        *(_ms(row.get(key)) for key in ("host_ms", "wall_ms")),
        _mb(row["extra_bytes"]),
        _mb(row["beyond_gradients"]),
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
    bias = [f"db error {row['db']['norm']:.1e}"] if "db" in row else []
    return "; ".join(strategies + bias + row["notes"] + row["problems"])


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _mb(size: float | None) -> str:
    return "" if size is None else mb(size)


def plot(result: dict[str, Any], path: Path) -> None:
    """A column for each shape: time over memory, and time over the share of labels that is ignored."""
    columns = _panels(result["cases"])
    rows = max(1, *map(len, columns))
    figure = Figure(figsize=(1 + 5 * len(columns), 0.5 + 4 * rows), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for panel in axes.flat:
        panel.set_visible(False)
    for column, panels in zip(axes.T, columns, strict=True):
        for panel, draw in zip(column, panels, strict=False):
            panel.set_visible(True)
            draw(panel)
    where = result["environment"]
    figure.supxlabel(f"{where['gpu']}, torch {where['torch']}, {where['date'][:10]}", fontsize="small")
    figure.savefig(path, dpi=150)


def _panels(cases: list[Case]) -> list[list[Callable[[Axes], None]]]:
    """For each shape what draws its panels. Memory is not known of CUDA graphs."""
    columns: dict[str, list[Callable[[Axes], None]]] = {case["name"]: [] for case in cases}
    several = over_shares(cases)
    for case in cases:
        if case not in several and mode_of(case) == DEFAULT:
            columns[case["name"]].append(functools.partial(_panel, case=case))
    for name, kind in dict.fromkeys((case["name"], case["activations"]) for case in several):
        together = [case for case in several if (case["name"], case["activations"]) == (name, kind)]
        columns[name].append(functools.partial(shares.panel, cases=together))
    return [panels for panels in columns.values() if panels] or [[]]


def _panel(axes: Axes, case: dict[str, Any]) -> None:
    name, _, kind = title(case).partition(", ")
    axes.set_title(f"{name}: {case['N']} x {case['V']} x {case['D']}, {kind}", fontsize=9)
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
