"""Rendering of what was rewritten and what was not."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import sympy

from ..algebra import notation
from ..common.findings import Cut, Miss, Site


def form_of_loss(expr: sympy.Expr, how: str, y: sympy.Symbol | None, ignore_index: int) -> str:
    """For example `mean[y != -100](lse - pick(y))`; without `mean` or `sum` where nothing is reduced.

    Without `[y != ...]` it is over all rows.
    """
    rows = "" if y is None else f"[{y} != {ignore_index}]"
    return f"{'' if how == 'none' else how}{rows}({notation.render(expr)})"


@dataclasses.dataclass
class Report:
    """What `explain` returns: the losses that are rewritten, and those that are not.

    Those over fewer classes than `min_vocab`, as of the router of a mixture of experts, are in `small` alone:
    they are no misses, and nobody else is told of them. In `cuts` is where Dynamo ended a graph, or gave a
    function up.
    """

    sites: list[Site] = dataclasses.field(default_factory=list)
    misses: list[Miss] = dataclasses.field(default_factory=list)
    small: list[Miss] = dataclasses.field(default_factory=list)
    cuts: list[Cut] = dataclasses.field(default_factory=list)

    def add(self, other: Report) -> None:
        """Take in what is told of another graph."""
        self.sites += other.sites
        self.misses += other.misses
        self.small += other.small
        self.cuts += other.cuts

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-serialisable values."""
        sites = [dataclasses.asdict(s) | {"statistics": list(s.statistics)} for s in self.sites]
        cuts = [dataclasses.asdict(cut) for cut in self.cuts]
        misses, small = _as_dicts(self.misses), _as_dicts(self.small)
        return {"sites": sites, "misses": misses, "small": small, "cuts": cuts}

    def __str__(self) -> str:
        fused = f"{len(self.sites)} {'loss' if len(self.sites) == 1 else 'losses'} fused"
        few = f", {len(self.small)} of few classes (.small)" if self.small else ""
        lines = [f"inductor_ce: {fused}, {len(self.misses)} left as written{few}"]
        told = [*map(_site_lines, self.sites), *map(_miss_lines, self.misses), *map(_cut_lines, self.cuts)]
        for (first, *others), count in Counter(map(tuple, told)).items():  # in a loop a line is told as often
            lines += [first + (f"    ({count} times)" if count > 1 else ""), *others]
        return "\n".join(lines)


def _as_dicts(misses: list[Miss]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(m) | {"reason": m.reason.name} for m in misses]


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
        *([("kept", site.kept)] if site.kept else []),
        *([("head", site.head)] if site.head else []),
    ]
    return [f"  fused   {site.location}  {site.code}", *(f"    {name:<11}{fact}" for name, fact in facts)]


def _miss_lines(miss: Miss) -> list[str]:
    return [f"  missed  {miss.location}  {miss.code}", f"    {miss.reason.name}: {miss.message}"]


def _cut_lines(cut: Cut) -> list[str]:
    return [f"  cut     {cut.location}  {cut.code}".rstrip(), f"    {cut.message}"]
