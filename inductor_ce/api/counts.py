"""What this process has counted: for programs that compare, and want to know that something was fused."""

from __future__ import annotations

from ..common.compat.dynamo import counters
from ..common.compat.inductor import auto_chunked_graphs

__all__ = ["auto_chunked_graphs", "counted", "forget_counts"]


def counted() -> dict[str, int]:
    """`sites` (losses rewritten), `misses`, heads by strategy, and `skips_rows`, heads that leave out rows
    that do not count; since the counts were forgotten."""
    return {str(key): count for key, count in counters["inductor_ce"].items()}


def forget_counts() -> None:
    """Begin again at 0, with all that torch.compile counts."""
    counters.clear()
