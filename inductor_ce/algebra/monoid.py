"""The law by which the statistics of two blocks of columns make those of the row that they make up."""

from __future__ import annotations

from typing import Any

Block = dict[str, Any]


def combine(left: Block, right: Block, xp: Any) -> Block:
    """The monoid: the statistics of a row from those of two blocks that make it up.

    Args:
        left, right: numbers or arrays under the names "max" (m), "sumexp" (sum exp(z - m)), and where wanted
            "sum" (sum z - m) with "count" (how many z), and "pick" (0 where the label lies in the other
            block). The identity is m = -inf and 0 for the rest. Differences from m = -inf are differences
            from 0.
        xp: numpy or torch, for `maximum`, `where` and `exp`.
    """
    m = xp.maximum(left["max"], right["max"])
    lowered = [_lowered(block, m, xp) for block in (left, right)]
    return {"max": m} | {name: lowered[0][name] + lowered[1][name] for name in left if name != "max"}


def _lowered(block: Block, m: Any, xp: Any) -> Block:
    """A block with its differences taken from m, which is at least its own maximum."""
    empty = block["max"] == -float("inf")
    gap = xp.where(empty, 0.0, block["max"] - m)
    result = block | {"sumexp": xp.where(empty, 0.0, block["sumexp"] * xp.exp(gap))}
    if "sum" in block:
        result["sum"] = block["sum"] + xp.where(empty, 0.0, block["count"] * gap)
    return result
