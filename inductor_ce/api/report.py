"""Rendering of what was rewritten and what was not."""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy

from ..algebra import notation
from ..common.findings import Miss, Site


def form_of_loss(expr: sympy.Expr, how: str, y: sympy.Symbol | None, ignore_index: int) -> str:
    """For example `mean[y != -100](lse - pick(y))`; without `mean` or `sum` where nothing is reduced.

    Without `[y != ...]` it is over all rows.
    """
    rows = "" if y is None else f"[{y} != {ignore_index}]"
    return f"{'' if how == 'none' else how}{rows}({notation.render(expr)})"


@dataclasses.dataclass
class Report:
    """What `explain` returns: the losses that are rewritten, and those that are not."""

    sites: list[Site] = dataclasses.field(default_factory=list)
    misses: list[Miss] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-serialisable values."""
        misses = [dataclasses.asdict(m) | {"reason": m.reason.name} for m in self.misses]
        return {
            "sites": [dataclasses.asdict(s) | {"statistics": list(s.statistics)} for s in self.sites],
            "misses": misses,
        }

    def __str__(self) -> str:
        fused = f"{len(self.sites)} {'loss' if len(self.sites) == 1 else 'losses'} fused"
        lines = [f"inductor_ce: {fused}, {len(self.misses)} left as written"]
        for site in self.sites:
            lines += _site_lines(site)
        for miss in self.misses:
            lines += _miss_lines(miss)
        return "\n".join(lines)


def site_line(site: Site) -> str:
    """One line for the log."""
    return f"{site.location}: fused {site.form} (logits {mebibytes(site.logits_bytes)})"


def miss_line(miss: Miss) -> str:
    """One line for the log and for warnings."""
    return f"{miss.location}: left as written [{miss.reason.name}] {miss.message}"


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _site_lines(site: Site) -> list[str]:
    facts = [
        ("form", site.form),
        ("statistics", ", ".join(site.statistics)),
        ("operator", f"row_stats[{site.which}]"),
        ("strategy", (site.plan or site.strategy) + ("; vocabulary sharded" if site.sharded else "")),
        *([("rows", site.rows)] if site.rows else []),
        ("logits", mebibytes(site.logits_bytes)),
        *([("head", site.head)] if site.head else []),
    ]
    return [f"  fused   {site.location}  {site.code}", *(f"    {name:<11}{fact}" for name, fact in facts)]


def _miss_lines(miss: Miss) -> list[str]:
    return [f"  missed  {miss.location}  {miss.code}", f"    {miss.reason.name}: {miss.message}"]
