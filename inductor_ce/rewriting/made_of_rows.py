"""The symbols that stand for one number of a row, made of the rows of `row_stats`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import sympy
import torch
from torch.fx import Node

from .. import algebra, ops
from ..algebra import symbols
from ..graph.builder import Builder
from ..ops.table import Statistic
from .weighed import SUMEXP, SUMEXP_EXTENDED

# The maximum where it stands alone, and nothing beside it tells of NaN.
MAX_OR_NAN = sympy.Symbol("max_or_nan", real=True)

# log d in float64, where it is to cancel.
LOG_SUMEXP_WIDE = sympy.Symbol("log_sumexp_wide", real=True)


class finite(sympy.Function):
    """What is added to a maximum, 0 where that is infinite."""

    @classmethod
    def eval(cls, shifted: sympy.Expr) -> sympy.Expr | None:
        return sympy.Integer(0) if shifted == symbols.MAX_SHIFTED else None


def _max_or_nan(build: Builder, m: Node, d: Node) -> Node:
    # A kernel's maximum need not see NaN; d does, and is NaN beside +inf as well.
    unseen = build(torch.logical_and, build(torch.isnan, d), build(torch.ne, m, torch.inf))
    return build(torch.where, unseen, torch.nan, m)


def _sumexp_extended(build: Builder, m: Node, d: Node) -> Node:
    # d is NaN in a row that holds +inf, whose logsumexp is +inf and has torch's gradient for d = 1.
    return build(torch.where, build(torch.eq, m, torch.inf), 1.0, d)


def _log_sumexp_extended(build: Builder, m: Node, d: Node) -> Node:
    return build(torch.log, _sumexp_extended(build, m, d))


class _OfRows(NamedTuple):
    """How a symbol is made: `by`, with a builder and the rows that it needs."""

    needs: tuple[Statistic, ...]
    by: Callable[..., Node]


# The symbols that are left when all is relative to the maximum.
OF_ROWS = {
    symbols.MAX: _OfRows((ops.MAX,), lambda build, m: m),
    MAX_OR_NAN: _OfRows((ops.MAX, ops.SUMEXP), _max_or_nan),
    symbols.MAX_SHIFTED: _OfRows((ops.MAX,), lambda build, m: build(torch.sub, m, m)),
    symbols.TOP_SHIFTED: _OfRows(
        (ops.TOP, ops.MAX, ops.ARGMAX), lambda build, top, m, _: build(torch.sub, top, m)
    ),
    symbols.LOG_SUMEXP: _OfRows((ops.SUMEXP,), lambda build, d: build(torch.log, d)),
    LOG_SUMEXP_WIDE: _OfRows((ops.SUMEXP,), lambda build, d: build(torch.log, build("double", d))),
    symbols.LOG_SUMEXP_EXTENDED: _OfRows((ops.MAX, ops.SUMEXP), _log_sumexp_extended),
    SUMEXP: _OfRows((ops.SUMEXP,), lambda build, d: d),
    SUMEXP_EXTENDED: _OfRows((ops.MAX, ops.SUMEXP), _sumexp_extended),
    symbols.SUM_SHIFTED: _OfRows((ops.SUM,), lambda build, s: s),
    symbols.MEAN_P_SHIFTED: _OfRows((ops.SUMEXPZ, ops.SUMEXP), lambda build, t, d: build(torch.div, t, d)),
    symbols.ARGMAX: _OfRows((ops.ARGMAX,), lambda build, first: first),
}
_MAXIMA_SHIFTED = [s.over_max - symbols.MAX for s in symbols.STATISTICS if symbols.is_maximum(s.symbol)]


def with_infinities(moved: sympy.Expr) -> sympy.Expr:
    """A shifted expression, of a row whose maximum is infinite as torch has it.

    Where the maximum is taken from the normaliser and cancels, that is NaN; else it is the maximum's to say.
    """
    normalised = moved.has(algebra.LOG_SUMEXP, algebra.LOG_SUMEXP_EXTENDED, algebra.log_sumexp_of)
    if not normalised or moved.has(algebra.MAX):
        moved = moved.subs({shifted: finite(shifted) for shifted in _MAXIMA_SHIFTED})
    return moved if normalised else moved.subs(algebra.MAX, MAX_OR_NAN)
