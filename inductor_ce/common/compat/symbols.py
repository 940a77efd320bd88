"""Symbolic sizes: what a graph's shapes are known, and guarded, to be."""

from __future__ import annotations

from typing import NamedTuple

import sympy
import torch
from torch._inductor import config


class Symbols(NamedTuple):
    """What is known of the symbols of some sizes.

    Attributes:
        hints: of each symbol that has one.
        ranges: the least and the most that each may be, None where it has no bound.
        guards: what holds of them, and of others, wherever compiled code runs.
    """

    hints: dict[sympy.Symbol, int]
    ranges: dict[sympy.Symbol, tuple[int | None, int | None]]
    guards: list[sympy.Basic]


def symbols_of(size: torch.SymInt) -> Symbols:
    """What is known of the symbols among which those of `size` are."""
    env = size.node.shape_env
    hints = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val  # from 2.11
    ranges = {symbol: (_finite(r.lower), _finite(r.upper)) for symbol, r in env.var_to_range.items()}
    return Symbols(
        {symbol: int(value) for symbol, value in hints.items() if value.is_Integer},
        ranges,
        [env.replace(guard.expr) for guard in env.guards],
    )


def expected_value(size: torch.SymInt) -> int:
    """By the example's values of its symbols, and Inductor's guess of those that depend on data."""
    known = symbols_of(size)
    values = {s: known.hints.get(s, _within(known.ranges.get(s))) for s in size.node.expr.free_symbols}
    return int(size.node.expr.xreplace(values))


def _within(bounds: tuple[int | None, int | None] | None) -> int:
    least, most = bounds or (None, None)
    at_most = config.unbacked_symint_fallback if most is None else min(most, config.unbacked_symint_fallback)
    return at_most if least is None else max(least, at_most)


def _finite(bound: sympy.Basic) -> int | None:
    return int(bound) if bound.is_Integer else None
