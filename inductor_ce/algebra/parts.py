"""Rows of which this rank has some columns: what is summed over them, and over the ranks.

The statistics of whole rows have the symbols that they have elsewhere, and so has p_i = exp(z_i - lse), of
which the lse is that of the whole row. Sums over the columns of this rank have symbols of their own:

    mass_here      sum_i p_i
    sum_here       sum_i z_i
    max_here       max_i z_i
    V_here         how many there are
    pick_here(y)   z_y

A mask is a symbol that is 0 or 1 in each row. A label counts where its condition, made of masks, is 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import sympy

from .symbols import LSE, MAX_HELD, expand, hit, label, pick
from .vocab import ONE, Monomial, P, Vocab, Z

MASS_HERE = sympy.Symbol("mass_here", positive=True)
SUM_HERE = sympy.Symbol("sum_here", real=True)
MAX_HERE = sympy.Symbol("max_here", extended_real=True)
V_HERE = sympy.Symbol("V_here", positive=True, integer=True)
pick_here = sympy.Function("pick_here", real=True)

MOST_MASKS = 4


class Picked(NamedTuple):
    """The label `y` where `condition` is 1, and none elsewhere."""

    y: sympy.Symbol
    condition: sympy.Expr


def total_here(value: Vocab) -> sympy.Expr | None:
    """The sum over the columns of this rank."""
    sums = {ONE: V_HERE, Z: SUM_HERE, P: MASS_HERE}
    result = sympy.Integer(0)
    for monomial, coefficient in value.terms:
        if monomial not in sums:
            return None
        result += coefficient * sums[monomial]
    return expand(result)


def at_here(value: Vocab, y: sympy.Symbol) -> sympy.Expr | None:
    """The value in column y of this rank."""
    if any(monomial.at or monomial.q for monomial, _ in value.terms):
        return None
    z = pick_here(y)
    return expand(sum((c * z**b.z * sympy.exp(b.p * (z - LSE)) for b, c in value.terms), sympy.Integer(0)))


def is_here(expr: sympy.Basic) -> bool:
    """Whether a row expression has a sum over the columns of this rank alone."""
    return expr.has(MASS_HERE, SUM_HERE, MAX_HERE, V_HERE) or bool(expr.atoms(pick_here))


def is_of_ranks(expr: sympy.Basic) -> bool:
    """Whether a row expression has a statistic of the whole row."""
    return expr.has(LSE, MAX_HELD) or bool(expr.atoms(pick, hit))


def without_powers(expr: sympy.Expr, masks: Iterable[sympy.Symbol]) -> sympy.Expr:
    """An expression expanded, in which the square of a mask is the mask."""
    expr, known = sympy.expand(expr), set(masks)
    return expr.replace(lambda e: e.is_Pow and e.base in known and e.exp.is_positive, lambda e: e.base)


def summed_over_ranks(
    expr: sympy.Expr, masks: set[sympy.Symbol], name: str
) -> tuple[sympy.Expr, dict[sympy.Symbol, Picked]] | None:
    """What all ranks have of a row expression, summed: a mass, or the logits at one label of each rank.

    Nobody knows which numbers, or other tensors, are the same on all ranks: beside what is summed may stand
    statistics of whole rows alone.

    Returns:
        the sum, and its label, named `name`, if it has one.
    """
    expr = without_powers(expr, masks)
    picks = expr.atoms(pick_here)
    if not picks:
        factor = expand(expr / MASS_HERE)
        alike = isinstance(factor, sympy.exp) and _is_alike(factor.args[0])
        return (factor, {}) if alike or factor == 1 else None
    if len(picks) > 1:
        return None
    (picked,) = picks
    if not expr.is_polynomial(picked) or sympy.degree(expr, picked) != 1:
        return None
    factor = expr.coeff(picked)
    found = _condition(factor, masks)
    if found is None:
        return None
    scale, condition, where = found
    rest = sympy.expand(expr - factor * picked)
    other = rest.subs(where)
    if abs(scale) != 1 or not _is_alike(other) or without_powers(rest - condition * other, masks) != 0:
        return None
    y = label(name, named=False)
    return expand(scale * pick(y) + other * hit(y)), {y: Picked(picked.args[0], condition)}


def _is_alike(expr: sympy.Expr) -> bool:
    """Whether an expression is the same on all ranks: statistics of whole rows, added or taken off."""
    terms = expr.as_coefficients_dict() if expr != 0 else {}
    return all(t in (LSE, MAX_HELD) and abs(n) == 1 for t, n in terms.items())


def _condition(
    factor: sympy.Expr, masks: set[sympy.Symbol]
) -> tuple[sympy.Expr, sympy.Expr, dict[sympy.Symbol, int]] | None:
    """(a, c, masks for which c is 1) of a factor a c, a a number and c 0 or 1."""
    if factor == 1:
        return sympy.Integer(1), factor, {}
    symbols = sorted(factor.free_symbols, key=str)
    if not masks.issuperset(symbols) or len(symbols) > MOST_MASKS:
        return None
    cases = [dict(zip(symbols, case, strict=True)) for case in itertools.product((0, 1), repeat=len(symbols))]
    values = [factor.subs(case) for case in cases]
    scales = {value for value in values if value != 0}
    if len(scales) != 1:
        return None
    (scale,) = scales
    return scale, sympy.expand(factor / scale), cases[values.index(scale)]


def potential(
    dz: Vocab, upstream: sympy.Symbol, picked: Mapping[sympy.Symbol, Picked], masks: set[sympy.Symbol]
) -> sympy.Expr | None:
    """A row expression whose gradient, its coefficients and the maxima held constant, is dz / upstream.

    Args:
        dz: the gradient of z_i that somebody computes.
        upstream: the gradient of the row that it is made of.
        picked: the labels of whole rows.
        masks: the symbols that are 0 or 1.

    Returns:
        the expression, over lse, sum_here and the logits at `picked`; None where there is none.
    """
    result = sympy.Integer(0)
    for monomial, coefficient in dz.terms:
        factor = without_powers(coefficient / upstream, masks)
        if factor.has(upstream):
            return None
        if monomial in (P, ONE):
            result += factor * (LSE if monomial == P else SUM_HERE)
            continue
        term = _at_label(monomial, factor, picked, masks)
        if term is None:
            return None
        result += term
    return expand(result)


def _at_label(
    monomial: Monomial,
    factor: sympy.Expr,
    picked: Mapping[sympy.Symbol, Picked],
    masks: set[sympy.Symbol],
) -> sympy.Expr | None:
    """What has the gradient `factor` at a label alone."""
    if len(monomial.at) != 1 or monomial != Monomial(at=monomial.at):
        return None
    (column,) = monomial.at
    for y, (own, condition) in picked.items():
        found = _condition(condition, masks)
        if own == column and found is not None:
            slope = factor.subs(found[2])
            if not slope.has(*masks) and without_powers(factor - slope * condition, masks) == 0:
                return slope * pick(y)
    return None
