"""Row statistics, and the functions that are built from them.

A loss reads a row z of logits only through a few numbers, its statistics:

    lse          log sum_i exp(z_i)
    lse(k)       log sum_i exp(k z_i)
    max, argmax  max_i z_i, and the first i where it is
    sum          sum_i z_i
    pick(y)      z_y, 0 where y is no column
    mean_p       sum_i p_i z_i, with p_i = exp(z_i - lse)
    dot(q)       sum_i q_i z_i
    mean_p(q)    sum_i p_i q_i
    mean_pz(q)   sum_i p_i q_i z_i

Among the q_i of the last four may be masks, 0 or 1 in each column, and `finite`, 1 where z_i is above -inf:
where one of them is 0 the column is left out, whatever else it would have.

Two kinds of value follow from that. A *row expression* has no vocabulary axis: it is a sympy expression
over the statistics and over numbers that the user's rows bring along. A *vocabulary expression* has one: it
is a sum of c b, with c a row expression and b a product of z_i, p_i, indicators [i = y] and tensors q_i that
the user brings along. Reducing the second over the vocabulary gives the first. Whatever cannot be written
so is None here, never an exception.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy

from .symbols import (
    ARGMAX,
    FINITE,
    LSE,
    LSE_EXTENDED,
    MAX,
    MEAN_P,
    SUM,
    V,
    dot,
    entry,
    expand,
    hit,
    is_mask,
    lse_of,
    mass,
    mean_p_of,
    mean_pz_of,
    pick,
    remembered,
    row_log,
    same,
)

# More labels than this on one row are nobody's target.
MAX_INDICATORS = 4

# Powers of z and p beyond this are nobody's loss, and cost time to multiply out.
MAX_DEGREE = 8


@dataclass(frozen=True)
class Monomial:
    """z^z p^p, [i = y] for each y in `at`, and q_i for each q in `q`. The power of p may be a fraction."""

    z: int = 0
    p: int | sympy.Rational = 0
    at: frozenset[sympy.Symbol] = frozenset()
    q: tuple[sympy.Symbol, ...] = ()

    def __mul__(self, other: Monomial) -> Monomial:
        both = set(self.q) & set(other.q)
        once = tuple(q for q in other.q if not (q in both and is_mask(q)))
        q = tuple(sorted(self.q + once, key=str))
        return Monomial(self.z + other.z, self.p + other.p, self.at | other.at, q)

    @property
    def sort_key(self) -> tuple[Any, ...]:
        return self.z, self.p, sorted(map(str, self.at)), list(map(str, self.q))


ONE, Z, P = Monomial(), Monomial(z=1), Monomial(p=1)


@dataclass(frozen=True)
class Vocab:
    """sum of coefficient * monomial: a value with the vocabulary axis."""

    terms: tuple[tuple[Monomial, sympy.Expr], ...]

    @staticmethod
    def of(terms: dict[Monomial, sympy.Expr]) -> Vocab:
        """Coefficients expanded, zero terms dropped, in a fixed order: equal values compare equal."""
        kept = {b: expand(c) for b, c in terms.items()}
        order = sorted(kept, key=lambda b: b.sort_key, reverse=True)
        return Vocab(tuple((b, kept[b]) for b in order if kept[b] != 0))

    @property
    def degree(self) -> int:
        return max((b.z + b.p + len(b.q) for b, _ in self.terms), default=0)

    @property
    def symbols(self) -> set[sympy.Symbol]:
        """Those of its labels and coefficients."""
        labels = {y for b, _ in self.terms for y in b.at}
        return labels.union(*(c.free_symbols for _, c in self.terms))

    def get(self, monomial: Monomial) -> sympy.Expr:
        return dict(self.terms).get(monomial, sympy.Integer(0))

    def renamed(self, names: dict[sympy.Symbol, sympy.Symbol]) -> Vocab:
        """The same with other symbols for its labels."""
        named = {b: replace(b, at=frozenset(names.get(y, y) for y in b.at)) for b, _ in self.terms}
        return Vocab.of({named[b]: c.subs(names) for b, c in self.terms})

    def __add__(self, other: Vocab | sympy.Expr) -> Vocab:
        terms = dict(self.terms)
        for b, c in as_vocab(other).terms:
            terms[b] = terms.get(b, sympy.Integer(0)) + c
        return Vocab.of(terms)

    def __mul__(self, other: Vocab | sympy.Expr) -> Vocab:
        terms: dict[Monomial, sympy.Expr] = {}
        for b1, c1 in self.terms:
            for b2, c2 in as_vocab(other).terms:
                terms[b1 * b2] = terms.get(b1 * b2, sympy.Integer(0)) + c1 * c2
        return Vocab.of(terms)

    def __neg__(self) -> Vocab:
        return self * sympy.Integer(-1)


LOGITS = Vocab.of({Z: sympy.Integer(1)})


def as_vocab(value: Vocab | sympy.Expr) -> Vocab:
    """A row expression as the same number in every column."""
    return value if isinstance(value, Vocab) else Vocab.of({ONE: value})


def indicator(y: sympy.Symbol) -> Vocab:
    """[i = y]"""
    return Vocab.of({Monomial(at=frozenset({y})): sympy.Integer(1)})


def columns(q: sympy.Symbol) -> Vocab:
    """q_i"""
    return Vocab.of({Monomial(q=(q,)): sympy.Integer(1)})


@remembered
def power(value: Vocab, exponent: int | sympy.Rational) -> Vocab | None:
    """A power: a whole one multiplied out, another one of c p^k with c positive."""
    if not 0 <= exponent * max(value.degree, 1) <= MAX_DEGREE:
        return None
    if not isinstance(exponent, int):
        order, constant = _power_of_p(value)
        logarithm = row_log(constant)
        if not order or logarithm is None:
            return None
        return Vocab.of({Monomial(p=order * exponent): sympy.exp(expand(exponent * logarithm))})
    result = as_vocab(sympy.Integer(1))
    for _ in range(exponent):
        result = result * value
    return result


def kept(value: Vocab, mask: Vocab) -> Vocab | None:
    """The value where `mask`, made of masks, is 1, and 0 where it is 0; None if that is no sum of statistics.

    What is left out may be infinite: no weight is multiplied by it, and a label in its column may be named.
    """
    bare = any(b.z and not b.p and b.at for b, _ in value.terms)
    return None if bare else mask * value


def leaves_out(value: Vocab) -> bool:
    """Whether a mask leaves columns out, which another weight, infinite there, would bring back."""
    return any(map(is_mask, itertools.chain(*(b.q for b, _ in value.terms))))


def is_weighed(value: Vocab) -> bool:
    """Whether a value has a tensor that the user brings along, which is no mask."""
    return not all(map(is_mask, itertools.chain(*(b.q for b, _ in value.terms))))


def is_0_at_a_label(value: Vocab) -> bool:
    """Whether what is made of numbers and indicators is 0 in the column of a label, and not in others."""
    number = value.get(ONE)
    return bool(number != 0) and any(number + c == 0 for b, c in value.terms if len(b.at) == 1)


def takes_entry_back(value: Vocab) -> bool:
    """Whether a probability is in every column but that of a label, as p_i (1 - [i = y]) is.

    Where it is nearly 1, nothing is left of the others if it is taken from the sum of all.
    """
    whole = {b: c for b, c in value.terms if b.p and not b.at}
    labelled = ((Monomial(p=b.p, z=b.z, q=b.q), c) for b, c in value.terms if len(b.at) == 1)
    return any(b in whole and whole[b] + c == 0 for b, c in labelled)


def select(mask: Vocab, yes: Vocab, no: Vocab) -> Vocab:
    """`yes` where `mask`, made of indicators, is 1, and `no` where it is 0."""
    return mask * yes + (as_vocab(sympy.Integer(1)) + (-mask)) * no


def in_each_column(
    function: Callable[[sympy.Expr], sympy.Expr], value: Vocab, masks: frozenset[sympy.Symbol] = frozenset()
) -> Vocab | None:
    """A function of numbers, 0 at 0, applied to what is made of numbers, indicators and masks of rows.

    Which of k labels name a column gives 2^k cases, each with its number; by inclusion and exclusion these
    are products of indicators again.
    """
    labels = sorted(frozenset().union(*(b.at for b, _ in value.terms)), key=str)
    if len(labels) > MAX_INDICATORS or any(b.z or b.p or b.q for b, _ in value.terms):
        return None
    common: set[sympy.Symbol] = next((c.free_symbols & masks for _, c in value.terms), set())
    mask = sympy.Mul(*sorted(common, key=str))
    numbers = {b.at: expand(c / mask) for b, c in value.terms}
    if not all(c.is_number for c in numbers.values()):
        return None
    cases = [frozenset(case) for k in range(len(labels) + 1) for case in itertools.combinations(labels, k)]
    results: dict[frozenset[sympy.Symbol], sympy.Expr] = {}
    for case in cases:
        here = sum((c for at, c in numbers.items() if at <= case), sympy.Integer(0))
        results[case] = function(here) - sum((r for at, r in results.items() if at < case), sympy.Integer(0))
    return Vocab.of({Monomial(at=case): mask * result for case, result in results.items()})


@remembered
def exp(value: Vocab) -> Vocab | None:
    """exp(k z + c) = p^k exp(k lse + c); exp(c) stays a row number."""
    constant = value.get(ONE)
    if value == as_vocab(constant):
        return as_vocab(sympy.exp(constant))
    order = _order(value)
    if order is None:
        return None
    lse = LSE_EXTENDED if constant.has(LSE_EXTENDED) else LSE
    return Vocab.of({Monomial(p=order): sympy.exp(expand(order * lse + constant))})


@remembered
def log(value: Vocab) -> Vocab | None:
    """log(c p^k) = k (z - lse) + log c."""
    order, constant = _power_of_p(value)
    logarithm = row_log(constant)
    if not order or logarithm is None:
        return None
    return Vocab.of({Z: sympy.sympify(order), ONE: logarithm - order * LSE})


def _power_of_p(value: Vocab) -> tuple[int | sympy.Rational, sympy.Expr]:
    """(k, c) of a value that is c p^k, (0, 0) of any other."""
    if len(value.terms) != 1:
        return 0, sympy.Integer(0)
    ((monomial, constant),) = value.terms
    return (monomial.p, constant) if monomial == Monomial(p=monomial.p) else (0, sympy.Integer(0))


def _order(value: Vocab) -> int | sympy.Rational | None:
    """The k of a value that is k z + c: 1, or any positive number where c has the normaliser of the row.

    What is scaled before it is normalised, as by a temperature, are logits in their own right.
    """
    if _is_shifted_logits(value):
        return 1
    order, constant = value.get(Z), value.get(ONE)
    alone = Vocab.of({Z: order, ONE: constant}) == value
    scaled = order.is_Rational and 0 < order <= MAX_DEGREE and constant.has(LSE, LSE_EXTENDED)
    return order if alone and scaled else None


def _is_shifted_logits(value: Vocab) -> bool:
    """Whether a value is z + c."""
    return value + (-as_vocab(value.get(ONE))) == LOGITS


@remembered
def log_softmax(value: Vocab) -> Vocab | None:
    """z - lse for z + c."""
    return LOGITS + (-LSE) if _is_shifted_logits(value) else None


@remembered
def softmax(value: Vocab) -> Vocab | None:
    """p for z + c."""
    return Vocab.of({P: sympy.Integer(1)}) if _is_shifted_logits(value) else None


@remembered
def logsumexp(value: Vocab) -> sympy.Expr | None:
    """lse + c for z + c, lse(k) + c for k z + c."""
    order = _order(value)
    if order is None:
        return None
    return (LSE_EXTENDED if order == 1 else lse_of(order)) + value.get(ONE)


@remembered
def peak(value: Vocab, maximum: sympy.Symbol = MAX) -> sympy.Expr | None:
    """The maximum over the vocabulary: max + c for z + c, exp(max - lse + c) for c p.

    `maximum` is the symbol of that of z, which says what gradient it has.
    """
    if _is_shifted_logits(value):
        return maximum + value.get(ONE)
    return value.get(P) * sympy.exp(maximum - LSE) if _is_positive_multiple_of_p(value) else None


def _is_positive_multiple_of_p(value: Vocab) -> bool:
    constant = value.get(P)
    positive = all(f.is_positive or isinstance(f, sympy.exp) for f in sympy.Mul.make_args(constant))
    return positive and value == Vocab.of({P: constant})


@remembered
def argmax(value: Vocab) -> sympy.Expr | None:
    """Where the maximum over the vocabulary is, that of z: for z + c, and for c p with c positive."""
    return ARGMAX if _is_shifted_logits(value) or _is_positive_multiple_of_p(value) else None


@remembered
def total(value: Vocab) -> sympy.Expr | None:
    """The sum over the vocabulary."""
    if cancels(value) or leaves_out_of_several(value):
        return None
    result = sympy.Integer(0)
    for b, c in value.terms:
        part = _total_of(b)
        if part is None:
            return None
        result += c * part
    return expand(result)


@remembered
def norm(value: Vocab) -> sympy.Expr | None:
    """The square root of the sum of squares, of c p."""
    order, _ = _power_of_p(value)
    square = power(value, 2) if order else None
    logarithm = None if square is None else row_log(total(square))
    return None if logarithm is None else sympy.exp(expand(logarithm / 2))


def cancels(value: Vocab) -> bool:
    """Whether powers of p stand beside targets, as in (p - q)^2, or one is taken from another.

    NOTE Powers that cancel
    Where p is near q, sum p^2 - 2 sum p q + sum q^2 is small and its terms are not, nor are those of its
    gradient; so it is with sum p^2 - sum p^3 where one p is near 1. Entry by entry the differences are taken
    before they are rounded as sums.
    """
    powers = [c for b, c in value.terms if not b.at and b.p not in (0, 1)]
    alike = all(c.is_positive for c in powers) or all(c.is_negative for c in powers)
    targets = any(b.at or b.q for b, _ in value.terms)
    return bool(powers) and (targets or (len(powers) > 1 and not alike))


def leaves_out_of_several(value: Vocab) -> bool:
    """Whether constants of several kinds are summed over the columns where z is finite, as of a divergence.

    They cancel, and are not added before they are summed, as where all columns count.
    """
    constants = [b for b, _ in value.terms if FINITE in b.q and not b.z and not b.p]
    return len(constants) > 1


def _total_of(b: Monomial) -> sympy.Expr | None:
    if b.at:
        if FINITE in b.q:
            return None
        y = min(b.at, key=str)
        return hit(y) * _at(b, y)
    if b.q:
        sums = {(0, 0): mass, (1, 0): dot, (0, 1): mean_p_of, (1, 1): mean_pz_of}
        return sums[b.z, b.p](*b.q) if (b.z, b.p) in sums else None
    if b.p not in (0, 1):
        return None if b.z else sympy.exp(lse_of(b.p) - b.p * LSE)
    return {ONE: V, Z: SUM, P: sympy.Integer(1), Z * P: MEAN_P}.get(b)


@remembered
def at(value: Vocab, y: sympy.Symbol) -> sympy.Expr | None:
    """The value in column y."""
    if any(FINITE in b.q for b, _ in value.terms):
        return None
    return expand(sum((c * _at(b, y) for b, c in value.terms), sympy.Integer(0)))


def _at(b: Monomial, y: sympy.Symbol) -> sympy.Expr:
    entries = sympy.Mul(*(entry(q, y) for q in b.q), *(same(y, other) for other in b.at - {y}))
    return pick(y) ** b.z * sympy.exp(b.p * (pick(y) - LSE)) * entries
