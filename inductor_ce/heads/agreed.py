"""How often ranks exchange statistics, agreed upon where a rank's number of rows is symbolic.

A rank may have been compiled for another number of rows than the ranks that it exchanges statistics with, as
where one was compiled anew for a reason of its own. So what was compiled is called for numbers of rows alone
for which all ranks would exchange as often.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..common.strategies import TOKEN_CHUNKS
from ..graph.shapes import hint, is_hinted
from .extra_memory import HeadNumbers
from .plan import plan

MOST_ROWS = 2**40


def agree(n: Any, numbers: HeadNumbers, strategy: str, memory_budget: int | float | None) -> None:
    """Add the guards on the number of rows n that the plan for `numbers` takes."""
    if isinstance(n, int) or not numbers.sharded or not is_hinted(n):
        return

    def exchanges(rows: int) -> int:
        planned = plan(replace(numbers, n=rows), strategy, memory_budget)
        return planned.pieces if planned.strategy == TOKEN_CHUNKS else 1

    least, most = alike(exchanges, hint(n))
    if not (n >= least and (most == MOST_ROWS or n <= most)):  # it is so in the example: a guard says so
        raise AssertionError(f"{n} rows are not from {least} to {most}")


def alike(exchanges: Callable[[int], int], rows: int) -> tuple[int, int]:
    """The least and the most rows with as many exchanges, of which more rows have no fewer."""
    wanted, sizes = exchanges(rows), range(MOST_ROWS + 1)
    least = bisect_left(sizes, wanted, key=exchanges)
    return least, max(least, bisect_right(sizes, wanted, key=exchanges) - 1)
