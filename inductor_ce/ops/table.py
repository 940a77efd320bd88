"""The table of statistics: all that any of them is.

A statistic is one entry. From it the operators, their loops and their templates take what a column adds to it
and what the gradient of that is, and `combine` how blocks of columns make a row.

    gap = z_i - m      exp = exp(gap)      q = the column's weight      c = the gradient that reaches the row
    k = the order of a power      power = exp(k gap)

An expression over these, with + and *, is Python over tensors and Triton alike; `limit(x)` is x, but 0 where
gap is -inf, as that is the limit of what it is written round; `seen(x)` is x, but 0 where q is NaN.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Per(enum.Enum):
    """What a `row_stats` has one such row for."""

    CALL = enum.auto()
    LABEL = enum.auto()
    ORDER = enum.auto()
    WEIGHT = enum.auto()


@dataclass(frozen=True)
class Statistic:
    """One entry of the table.

    Attributes:
        name: in the argument `which` of the operators.
        per: of what there is one.
        term: what a column adds; None for what is no sum.
        slope: what a column's gradient gains; None for 0.
        beside: the name of the statistic that meets the rise, or COUNT.
        has_exp: whether the terms have exp, or power.
        held: what a sweep has anyway: MAXIMUM, or FIRST, the first column with it.
        at: the name of the statistic that says which column alone has a gradient, c; None for none.
    """

    name: str
    per: Per = Per.CALL
    term: str | None = None
    slope: str | None = None
    beside: str | None = None
    has_exp: bool = False
    held: str | None = None
    at: str | None = None


COUNT = "count"
MAXIMUM, FIRST = "maximum", "first"

MAX = Statistic("max", held=MAXIMUM)
SUMEXP = Statistic("sumexp", term="exp", slope="c * exp", has_exp=True)
PICK = Statistic("pick", Per.LABEL)
PICKS = Statistic("picks*", Per.LABEL)  # of several labels a row, in as many rows of the packed result
SUM = Statistic("sum", term="gap", slope="c", beside=COUNT)
SUMEXPZ = Statistic(
    "sumexpz",
    term="limit(gap * exp)",
    slope="c * limit((gap + 1) * exp)",
    beside="sumexp",
    has_exp=True,
)
ARGMAX = Statistic("argmax", held=FIRST)
TOP = Statistic("top", held=MAXIMUM, at="argmax")
POWER = Statistic("sumexp^", Per.ORDER, term="power", slope="c * (power * k)", has_exp=True)
DOT = Statistic("dot", Per.WEIGHT, term="q * gap", slope="c * q", beside="mass")
MASS = Statistic("mass", Per.WEIGHT, term="q")
EXPDOT = Statistic("expdot", Per.WEIGHT, term="q * exp", slope="c * q * exp", has_exp=True)
# The same of the columns whose gap is above -inf; in a row that holds NaN or +inf, the mass of any.
KEPT_DOT = Statistic("keptdot", Per.WEIGHT, term="limit(q * gap)", slope="c * limit(q)", beside="keptmass")
KEPT_MASS = Statistic("keptmass", Per.WEIGHT, term="limit(q)")
EXPZDOT = Statistic(
    "expzdot",
    Per.WEIGHT,
    term="limit(q * (gap * exp))",
    slope="c * limit(q * ((gap + 1) * exp))",
    beside="keptexpdot",
    has_exp=True,
)
KEPT_EXPDOT = Statistic(
    "keptexpdot", Per.WEIGHT, term="limit(q * exp)", slope="c * limit(q * exp)", has_exp=True
)
# Of those whose weight is not NaN, which is how it says that it leaves a column out, whatever z is there.
SEEN_DOT = Statistic("seendot", Per.WEIGHT, term="seen(q * gap)", slope="c * seen(q)", beside="seenmass")
SEEN_MASS = Statistic("seenmass", Per.WEIGHT, term="seen(q)")

# In the order of the packed result.
ALWAYS = (MAX, SUMEXP)
OPTIONAL = (SUM, SUMEXPZ, ARGMAX, TOP)
WEIGHED = (DOT, MASS, EXPDOT, KEPT_DOT, KEPT_MASS, EXPZDOT, KEPT_EXPDOT, SEEN_DOT, SEEN_MASS)
