"""Row expressions: functions of the statistics of a row, in sympy."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy

V = sympy.Symbol("V", positive=True, integer=True)
LSE = sympy.Symbol("lse", real=True)
MAX = sympy.Symbol("max", real=True)
MAX_HELD = sympy.Symbol("max", extended_real=True)  # the same, detached: a constant to every gradient
TOP = sympy.Symbol("top", real=True)  # the same, its gradient that of the first column that has it
ARGMAX = sympy.Symbol("argmax", integer=True)
SUM = sympy.Symbol("sum", real=True)
MEAN_P = sympy.Symbol("mean_p", real=True)
pick = sympy.Function("pick", real=True)
dot = sympy.Function("dot", real=True)
mean_p_of = sympy.Function("mean_p", real=True)
mean_pz_of = sympy.Function("mean_pz", real=True)
lse_of = sympy.Function("lse", real=True)  # of an order k: log sum_i exp(k z_i)

# Among the weights of a sum: 1 where z_i is above -inf, and where it is not, the column is left out.
FINITE = sympy.Symbol("finite", integer=True)

# Of what the user brings along: sum_i q_i, and q_y.
mass = sympy.Function("mass", real=True)
entry = sympy.Function("entry", real=True)

# torch.logsumexp of a row that holds +inf is +inf where log_softmax gives NaN: same name, own symbol.
LSE_EXTENDED = sympy.Symbol("lse", extended_real=True)

# The statistics relative to the row's maximum, see `shifted`.
LOG_SUMEXP = sympy.Symbol("log_sumexp", real=True)
LOG_SUMEXP_EXTENDED = sympy.Symbol("log_sumexp", extended_real=True)
MAX_SHIFTED = sympy.Symbol("max_shifted", real=True)  # 0, and NaN where the maximum is infinite
TOP_SHIFTED = sympy.Symbol("top_shifted", real=True)  # as max_shifted, but with a gradient
SUM_SHIFTED = sympy.Symbol("sum_shifted", real=True)
MEAN_P_SHIFTED = sympy.Symbol("mean_p_shifted", real=True)
pick_shifted = sympy.Function("pick_shifted", real=True)
dot_shifted = sympy.Function("dot_shifted", real=True)
mean_pz_shifted = sympy.Function("mean_pz_shifted", real=True)
log_sumexp_of = sympy.Function("log_sumexp", real=True)


@dataclass(frozen=True)
class Statistic:
    """A statistic that has no argument.

    Attributes:
        symbol: in row expressions.
        over_max: the same over statistics relative to the row's maximum, see `shifted`.
        normalises: whether it is the normaliser of a row, or has the softmax that comes of it.
        weighs: whether it has some of the logits, apart from the normaliser.
        held: of a maximum through which a gradient flows, the same as a constant.
        lacks_gradient: whether no row of ours has the gradient that it has in torch.
    """

    symbol: sympy.Symbol
    over_max: sympy.Expr
    normalises: bool = False
    weighs: bool = False
    held: sympy.Symbol | None = None
    lacks_gradient: bool = False


STATISTICS = (
    Statistic(LSE, MAX + LOG_SUMEXP, normalises=True),
    Statistic(LSE_EXTENDED, MAX + LOG_SUMEXP_EXTENDED, normalises=True),
    Statistic(MAX, MAX + MAX_SHIFTED, weighs=True, held=MAX_HELD, lacks_gradient=True),
    Statistic(MAX_HELD, MAX + MAX_SHIFTED, weighs=True),
    Statistic(TOP, MAX + TOP_SHIFTED, weighs=True, held=MAX_HELD),
    Statistic(ARGMAX, ARGMAX, weighs=True),
    Statistic(SUM, V * MAX + SUM_SHIFTED, weighs=True),
    Statistic(MEAN_P, MAX + MEAN_P_SHIFTED, normalises=True, weighs=True),
)
_OVER_MAX = {s.symbol: s.over_max for s in STATISTICS}
_HELD = {s.symbol: s.held for s in STATISTICS if s.held is not None}
_NORMALISERS = tuple(s.symbol for s in STATISTICS if s.normalises)
_WEIGHING = tuple(s.symbol for s in STATISTICS if s.weighs)
_WITHOUT_GRADIENT = tuple(s.symbol for s in STATISTICS if s.lacks_gradient)


class same(sympy.Function):
    """1 where two labels name one column, else 0."""

    is_real = True


class hit(sympy.Function):
    """1 where a label names a column, else 0."""

    is_real = True

    @classmethod
    def eval(cls, y: sympy.Expr) -> sympy.Expr | None:
        return sympy.Integer(1) if y.is_nonnegative else None


def label(name: str, named: bool = True) -> sympy.Symbol:
    """The symbol of a label tensor, the argument of `pick`. Unless `named`, it need not name a column."""
    return sympy.Symbol(name, integer=True, nonnegative=True) if named else sympy.Symbol(name, integer=True)


def outside(name: str) -> sympy.Symbol:
    """The symbol of a tensor that is not made of the logits, with the vocabulary axis or without."""
    return sympy.Symbol(name, real=True)


def mask(name: str) -> sympy.Symbol:
    """The symbol of a tensor of truth values that keeps columns or leaves them out."""
    return sympy.Symbol(name, integer=True)


def is_mask(symbol: sympy.Basic) -> bool:
    """Whether a weight of columns is 0 or 1 in each."""
    return bool(symbol.is_integer)


def number(value: float) -> sympy.Expr:
    """A finite Python number as the decimal that was written: 0.9 + 0.1 is 1 here, and cancels as 1."""
    return sympy.Integer(int(value)) if isinstance(value, int) else sympy.Rational(repr(float(value)))


# A model has the same softmax many times over.
remembered = functools.lru_cache(maxsize=4096)


@remembered
def expand(value: sympy.Expr) -> sympy.Expr:
    """Products multiplied out, and products of exponentials gathered into one: it is what stays finite."""
    if value.is_Atom:
        return value
    expanded = sympy.expand(value, power_exp=False)
    return sympy.powsimp(expanded, combine="exp") if expanded.has(sympy.exp) else expanded


def row_log(value: sympy.Expr) -> sympy.Expr | None:
    """log of one product of positive numbers and exponentials."""
    result = sympy.Integer(0)
    for factor in sympy.Mul.make_args(value):
        if isinstance(factor, sympy.exp):
            result += factor.args[0]
        elif factor.is_positive:
            result += sympy.log(factor)
        else:
            return None
    return expand(result)


@remembered
def shifted(value: sympy.Expr) -> sympy.Expr:
    """The same row expression over statistics taken relative to the row's maximum.

    lse = max + log_sumexp, lse(k) = k max + log_sumexp(k), pick = hit max + pick_shifted, sum = V max +
    sum_shifted, mean_p = max + mean_p_shifted, dot = mass max + dot_shifted, mean_pz(q) = mean_p(q) max +
    mean_pz_shifted, and a maximum is max + 0, but
    max + NaN where it is infinite, as differences of infinities are. In a loss that does not change when a
    constant is added to all logits, and almost every loss is such, `max` cancels here, before any rounding.
    """
    over_max = dict(_OVER_MAX)
    over_max |= {p: hit(*p.args) * MAX + pick_shifted(*p.args) for p in value.atoms(pick)}
    over_max |= {d: mass(*d.args) * MAX + dot_shifted(*d.args) for d in value.atoms(dot)}
    over_max |= {f: mean_p_of(*f.args) * MAX + mean_pz_shifted(*f.args) for f in value.atoms(mean_pz_of)}
    over_max |= {lse: lse.args[0] * MAX + log_sumexp_of(*lse.args) for lse in value.atoms(lse_of)}
    return expand(value.subs(over_max, simultaneous=True))


@remembered
def held(value: sympy.Basic) -> sympy.Basic:
    """The same where no gradient flows through it: maxima are constants."""
    return value.subs(_HELD)


def lacks_gradient(value: sympy.Basic) -> bool:
    """Whether an expression has a statistic of whose gradient in torch we have none."""
    return value.has(*_WITHOUT_GRADIENT)


def is_maximum(value: sympy.Expr) -> bool:
    """Whether a row expression is the maximum of the row, plus a number."""
    return (held(value) - MAX_HELD).is_number


def labels_of(value: sympy.Expr) -> list[sympy.Symbol]:
    """The labels that a row expression reads, by name."""
    read = {f.args[-1] for f in value.atoms(pick, hit, entry)}
    read |= {y for f in value.atoms(same) for y in f.args}
    return sorted(read, key=str)


def picks_of(value: sympy.Expr) -> list[sympy.Symbol]:
    """The labels whose logit a row expression reads, by name."""
    return sorted({f.args[0] for f in value.atoms(pick)}, key=str)


def is_normalised(value: sympy.Expr) -> bool:
    """Whether an expression has the normaliser of a row, or the softmax that comes of it."""
    return value.has(*_NORMALISERS) or bool(value.atoms(mean_p_of, mean_pz_of, lse_of))


@remembered
def takes_back(value: sympy.Expr) -> bool:
    """Whether a sum over all classes has one class taken away again, whose logit then adds nothing.

    Where that is a mask's -1e9, whose probability is 0, nothing is left of the others. Labels are taken to
    differ.
    """
    if not value.has(SUM, dot) or not value.has(pick):
        return False
    value = value.replace(same, lambda *_: sympy.Integer(0)).replace(hit, lambda *_: sympy.Integer(1))
    value = value.xreplace({e: sympy.Integer(0) for e in value.atoms(sympy.exp) if e.has(pick)})
    sums = [SUM] * value.has(SUM) + sorted(value.atoms(dot), key=str)
    picks = sorted(value.atoms(pick), key=str)
    held = {term: sympy.Dummy(real=True) for term in (*sums, *picks)}
    value = value.xreplace(held)
    for y in picks:
        ones = [sympy.Integer(1) if term == SUM else entry(*term.args, *y.args) for term in sums]
        net = sum(value.diff(held[term]) * one for term, one in zip(sums, ones, strict=True))
        if net != 0 and sympy.expand(net + value.diff(held[y])) == 0:
            return True
    return False


def has_power(value: sympy.Basic) -> bool:
    """Whether an expression has a sum of powers of probabilities."""
    return bool(value.atoms(lse_of))


def weighs_probabilities(value: sympy.Basic) -> bool:
    """Whether an expression has some of the probabilities of a row, themselves or under a weight."""
    return any(e.has(pick) for e in value.atoms(sympy.exp)) or bool(value.atoms(mean_p_of, mean_pz_of))


def powers_cancel(*values: sympy.Basic) -> bool:
    """Whether powers of probabilities are summed beside some of the probabilities, from which they differ
    by little."""
    return any(map(has_power, values)) and any(map(weighs_probabilities, values))


def _is_weighed_sum(factors: sympy.Basic) -> bool:
    """Whether a product is sum_i q_i exp(z_i), a normaliser under a weight."""
    exps = [e for e in factors.args if isinstance(e, sympy.exp) and e.args[0].coeff(LSE) == 1]
    return factors.is_Mul and bool(exps) and any(e.func == mean_p_of for e in factors.args)


def weighs_logits(value: sympy.Expr) -> bool:
    """Whether an expression has some of the logits of a row, apart from its normaliser."""
    value = value.replace(_is_weighed_sum, lambda factors: sympy.exp(LSE))
    return value.has(*_WEIGHING) or bool(value.atoms(pick, dot, mean_p_of, mean_pz_of, lse_of))
