"""Records as bars."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BAR_WIDTH = 0.8
CUT = 1.5  # bars of time end here, so that those below 1 can be told apart


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


def finish(figure: Figure, axes: Any, result: dict[str, Any], path: Path) -> None:
    """The legend, where and when the numbers were made, and the file."""
    handles = {h.get_label(): h for a in axes[0] for h in a.containers}
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=len(handles))
    where = result["environment"]
    figure.supxlabel(f"{where['gpu']}, torch {where['torch']}, {where['date'][:10]}", fontsize="small")
    figure.savefig(path, dpi=150)
