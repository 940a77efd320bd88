"""Row statistics, the functions built from them, and the law by which blocks of a row combine.

A loss reads a row z of logits only through a few numbers, its statistics:

    lse      log sum_i exp(z_i)
    max      max_i z_i
    sum      sum_i z_i
    pick(y)  z_y

Two kinds of value follow from that. A *row expression* has no vocabulary axis: it is a sympy expression
over the statistics. A *vocabulary expression* has one: it is a sum of c b, with c a row expression and b
a product of z_i, p_i = exp(z_i - lse) and indicators [i = y]. Reducing the second over the vocabulary
gives the first. Whatever cannot be written so is None here, never an exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

V = sympy.Symbol("V", positive=True, integer=True)
LSE = sympy.Symbol("lse", real=True)
MAX = sympy.Symbol("max", real=True)
SUM = sympy.Symbol("sum", real=True)
pick = sympy.Function("pick", real=True)

# torch.logsumexp of a row that holds +inf is +inf where log_softmax gives NaN: same name, own symbol.
LSE_EXTENDED = sympy.Symbol("lse", extended_real=True)

# The statistics relative to the row's maximum, see `shifted`.
LOG_SUMEXP = sympy.Symbol("log_sumexp", real=True)
LOG_SUMEXP_EXTENDED = sympy.Symbol("log_sumexp", extended_real=True)
SUM_SHIFTED = sympy.Symbol("sum_shifted", real=True)
pick_shifted = sympy.Function("pick_shifted", real=True)


def label(name: str) -> sympy.Symbol:
    """The symbol of a label tensor, the argument of `pick`."""
    return sympy.Symbol(name, integer=True)


def number(value: float) -> sympy.Expr:
    """A finite Python number as the decimal that was written: 0.9 + 0.1 is 1 here, and cancels as 1."""
    return sympy.Integer(int(value)) if isinstance(value, int) else sympy.Rational(repr(float(value)))


Block = dict[str, Any]


def expand(value: sympy.Expr) -> sympy.Expr:
    """Products multiplied out, and products of exponentials gathered into one: it is what stays finite."""
    expanded = sympy.expand(value, power_exp=False)
    return sympy.powsimp(expanded, combine="exp") if expanded.has(sympy.exp) else expanded


@dataclass(frozen=True)
class Monomial:
    """z^z p^p [i = y] for each y in `at`."""

    z: int = 0
    p: int = 0
    at: frozenset[sympy.Symbol] = frozenset()

    def __mul__(self, other: Monomial) -> Monomial:
        return Monomial(self.z + other.z, self.p + other.p, self.at | other.at)


ONE, Z, P = Monomial(), Monomial(z=1), Monomial(p=1)


@dataclass(frozen=True)
class Vocab:
    """sum of coefficient * monomial: a value with the vocabulary axis."""

    terms: tuple[tuple[Monomial, sympy.Expr], ...]

    @staticmethod
    def of(terms: dict[Monomial, sympy.Expr]) -> Vocab:
        """Coefficients expanded, zero terms dropped, in a fixed order: equal values compare equal."""
        kept = {b: expand(c) for b, c in terms.items()}
        order = sorted(kept, key=lambda b: (b.z, b.p, sorted(map(str, b.at))), reverse=True)
        return Vocab(tuple((b, kept[b]) for b in order if kept[b] != 0))

    @property
    def degree(self) -> int:
        return max((b.z + b.p for b, _ in self.terms), default=0)

    def get(self, monomial: Monomial) -> sympy.Expr:
        return dict(self.terms).get(monomial, sympy.Integer(0))

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


def exp(value: Vocab) -> Vocab | None:
    """exp(z + c) = p exp(lse + c); exp(c) stays a row number."""
    constant = value.get(ONE)
    if value == as_vocab(constant):
        return as_vocab(sympy.exp(constant))
    if value + (-as_vocab(constant)) != LOGITS:
        return None
    lse = LSE_EXTENDED if constant.has(LSE_EXTENDED) else LSE
    return Vocab.of({P: sympy.exp(expand(lse + constant))})


def log(value: Vocab) -> Vocab | None:
    """log(c p) = z - lse + log c."""
    constant = value.get(P)
    if constant == 0 or constant.could_extract_minus_sign() or value != Vocab.of({P: constant}):
        return None
    return Vocab.of({Z: sympy.Integer(1), ONE: row_log(constant) - LSE})


def row_log(value: sympy.Expr) -> sympy.Expr:
    """log of a row expression, products taken apart: the statistics are real, the factors positive."""
    return expand(sympy.expand_log(sympy.log(value), force=True))


def log_softmax(value: Vocab) -> Vocab | None:
    """z - lse for z + c."""
    constant = value.get(ONE)
    return LOGITS + (-LSE) if value + (-as_vocab(constant)) == LOGITS else None


def softmax(value: Vocab) -> Vocab | None:
    """p for z + c."""
    return None if log_softmax(value) is None else Vocab.of({P: sympy.Integer(1)})


def logsumexp(value: Vocab) -> sympy.Expr | None:
    """lse + c for z + c."""
    constant = value.get(ONE)
    return None if log_softmax(value) is None else LSE_EXTENDED + constant


def peak(value: Vocab) -> sympy.Expr | None:
    """The maximum over the vocabulary: max + c for z + c."""
    constant = value.get(ONE)
    return None if log_softmax(value) is None else MAX + constant


def total(value: Vocab) -> sympy.Expr | None:
    """The sum over the vocabulary."""
    result = sympy.Integer(0)
    for b, c in value.terms:
        part = _total_of(b, c)
        if part is None:
            return None
        result += part
    return expand(result)


def _total_of(b: Monomial, c: sympy.Expr) -> sympy.Expr | None:
    if len(b.at) == 1:
        return c * _at(b, next(iter(b.at)))
    sums = {ONE: V, Z: SUM, P: sympy.Integer(1)}
    return c * sums[b] if b in sums else None


def at(value: Vocab, y: sympy.Symbol) -> sympy.Expr | None:
    """The value in column y."""
    if any(b.at - {y} for b, _ in value.terms):
        return None
    return expand(sum((c * _at(b, y) for b, c in value.terms), sympy.Integer(0)))


def _at(b: Monomial, y: sympy.Symbol) -> sympy.Expr:
    return pick(y) ** b.z * sympy.exp(b.p * (pick(y) - LSE))


def shifted(value: sympy.Expr) -> sympy.Expr:
    """The same row expression over statistics taken relative to the row's maximum.

    lse = max + log_sumexp, pick = max + pick_shifted, sum = V max + sum_shifted. In a loss that does
    not change when a constant is added to all logits, and almost every loss is such, `max` cancels
    here, before any rounding.
    """
    over_max = {LSE: MAX + LOG_SUMEXP, LSE_EXTENDED: MAX + LOG_SUMEXP_EXTENDED, SUM: V * MAX + SUM_SHIFTED}
    over_max |= {p: MAX + pick_shifted(*p.args) for p in value.atoms(pick)}
    return expand(value.subs(over_max, simultaneous=True))


def labels_of(value: sympy.Expr) -> list[sympy.Symbol]:
    """The labels picked in a row expression, by name."""
    return sorted((p.args[0] for p in value.atoms(pick)), key=str)


def statistics_of(value: sympy.Expr) -> list[str]:
    """The names of the statistics in a row expression, in the order of the table above."""
    names = [s.name for s in (LSE, LSE_EXTENDED, MAX, SUM) if value.has(s)]
    return list(dict.fromkeys(names)) + [f"pick({y})" for y in labels_of(value)]


class _Printer(StrPrinter):
    def _print_Float(self, value: sympy.Float) -> str:
        return repr(float(value))

    def _print_Add(self, expr: sympy.Add, order: Any = None) -> str:
        """Positive terms first, and lse before picked logits before their sum."""
        terms = sorted(
            expr.args, key=lambda t: (t.could_extract_minus_sign(), t.has(SUM), t.has(pick), str(t))
        )
        parts = [self._print(terms[0])]
        for term in terms[1:]:
            minus = term.could_extract_minus_sign()
            parts.append(
                f" {'-' if minus else '+'} {self.parenthesize(-term if minus else term, PRECEDENCE['Add'])}"
            )
        return "".join(parts)


def render(value: sympy.Expr) -> str:
    """The normal form as text, for example `lse - 0.9*pick(y) - 0.1*sum/V`."""
    decimal = value.replace(lambda e: e.is_Rational and not e.is_Integer, sympy.Float)
    return _Printer().doprint(decimal)


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
