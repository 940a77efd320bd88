"""Sums over the classes of whatever the entries of rows make by themselves, which no statistic is.

A *term* is a number; ("p", s), ("log p", s) or ("z", s), the probability of an entry, its logarithm and its
logit on the side s, as in `divergences`; ("t", k), an entry of the k-th tensor that the user brings along;
("n", k) or ("c", k), the k-th number that its row has, through which a gradient flows or does not; or a
function of terms, as ("mul", a, b). With g the term of an entry, the gradient of sum_i g_i with respect to a
side's logits is

    e_i - p_i sum_i e_i + dg_i/dz_i,   e = dg/d(log p) + p dg/dp,

the derivatives of the softmax put in, and that with respect to a number of the row sum_i dg_i/dn.
Those of the functions are torch's own, also where there are none: 0
for |x| at 0, a half for each of equal values of which the larger is taken, and at the ends of
("clamp", x, low, high, passes), where torch's releases differ, `passes`, 1 or 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

Term = float | tuple[Any, ...]

MOST_TERMS = 150  # of what is summed, each as often as it is written: more is no loss

OF_SIDES = ("p", "log p", "z")
LEAVES = (*OF_SIDES, "t", "n", "c")

# What is true or false of an entry.
TRUTHS = ("gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not")


class Entries(NamedTuple):
    """The sum over the classes of `term`, and of which sides gradients are wanted."""

    term: Term
    n_sides: int
    n_tensors: int
    wanted: tuple[int, ...]

    @property
    def sides(self) -> range:
        return range(self.n_sides)

    @property
    def summed(self) -> list[int]:
        """The sides whose gradients need a sum over the classes."""
        return [side for side in self.wanted if slope(self.term, side) != 0]

    @property
    def n_moving(self) -> int:
        """How many numbers a row has through which a gradient flows."""
        return len(leaves_of(self.term, "n"))

    @property
    def n_numbers(self) -> int:
        """How many it has, those first."""
        return self.n_moving + len(leaves_of(self.term, "c"))


# Terms made of terms, simpler where a part is 0 or 1 because no gradient, or all of it, comes that way


def _add(a: Term, b: Term) -> Term:
    if isinstance(a, float) and isinstance(b, float):
        return a + b
    return b if a == 0 else a if b == 0 else ("add", a, b)


def _sub(a: Term, b: Term) -> Term:
    if isinstance(a, float) and isinstance(b, float):
        return a - b
    return a if b == 0 else _neg(b) if a == 0 else ("sub", a, b)


def _neg(a: Term) -> Term:
    return -a if isinstance(a, float) else ("neg", a)


def _mul(a: Term, b: Term) -> Term:
    if a == 0 or b == 0:
        return 0.0
    if isinstance(a, float) and isinstance(b, float):
        return a * b
    if _is_masked(a):
        return _where(a[1], _mul(a[2], b), _mul(a[3], b))  # type: ignore[index]
    if _is_masked(b):
        return _where(b[1], _mul(a, b[2]), _mul(a, b[3]))  # type: ignore[index]
    return b if a == 1 else a if b == 1 else ("mul", a, b)


def _div(a: Term, b: Term) -> Term:
    if _is_masked(a):
        return _where(a[1], _div(a[2], b), _div(a[3], b))  # type: ignore[index]
    return 0.0 if a == 0 else ("div", a, b)


def _is_masked(term: Term) -> bool:
    """Whether no gradient comes by some entries: then none does where what it is multiplied by is NaN."""
    branches = term[2:] if isinstance(term, tuple) and term[0] == "where" else ()
    return any(branch == 0 or _is_masked(branch) for branch in branches)


def _where(condition: Term, a: Term, b: Term) -> Term:
    return a if a == b else ("where", condition, a, b)


# The derivatives: of (own arguments, theirs)

_Rule = Callable[..., Term]


def _of_power(x: Term, n: Term, dx: Term, dn: Term) -> Term:
    if isinstance(n, float):
        return _mul(n, _mul(1.0 if n == 1 else ("pow", x, n - 1), dx)) if n else 0.0
    by_x = _where(("eq", n, 0.0), 0.0, _mul(("mul", n, ("pow", x, ("sub", n, 1.0))), dx))
    is_zero = ("and", ("eq", x, 0.0), ("ge", n, 0.0))
    by_n = _where(is_zero, 0.0, _mul(("mul", ("log", x), ("pow", x, n)), dn))
    return _add(by_x, by_n)


def _of_xlogy(x: Term, y: Term, dx: Term, dy: Term) -> Term:
    is_zero = ("and", ("eq", x, 0.0), ("le", y, 0.0))
    return _add(_mul(_where(is_zero, 0.0, ("log", y)), dx), _mul(("div", x, y), dy))


def _of_larger(sign: str) -> _Rule:
    def rule(a: Term, b: Term, da: Term, db: Term) -> Term:
        both = _mul(0.5, _add(da, db))
        return _where(("eq", a, b), both, _where((sign, a, b), da, db))

    return rule


def _share(a: Term, b: Term) -> Term:
    """e^a / (e^a + e^b)"""
    return "div", 1.0, ("add", ("exp", ("sub", b, a)), 1.0)


def _of_clamped(x: Term, low: Term, high: Term, passes: Term, dx: Term, *_: Term) -> Term:
    below, above = ("lt", "gt") if passes else ("le", "ge")
    return _where(("or", (below, x, low), (above, x, high)), 0.0, dx)


_RULES: dict[str, _Rule] = {
    "add": lambda a, b, da, db: _add(da, db),
    "sub": lambda a, b, da, db: _sub(da, db),
    "mul": lambda a, b, da, db: _add(_mul(da, b), _mul(a, db)),
    "div": lambda a, b, da, db: _div(_sub(da, _mul(("div", a, b), db)), b),
    "neg": lambda a, da: _neg(da),
    "exp": lambda a, da: _mul(("exp", a), da),
    "log": lambda a, da: _div(da, a),
    "log1p": lambda a, da: _div(da, ("add", a, 1.0)),
    "sqrt": lambda a, da: _div(da, ("mul", ("sqrt", a), 2.0)),
    "abs": lambda a, da: _mul(("sign", a), da),
    "sigmoid": lambda a, da: _mul(("mul", ("sigmoid", a), ("sub", 1.0, ("sigmoid", a))), da),
    "tanh": lambda a, da: _mul(("sub", 1.0, ("pow", ("tanh", a), 2.0)), da),
    "pow": _of_power,
    "xlogy": _of_xlogy,
    "maximum": _of_larger("gt"),
    "minimum": _of_larger("lt"),
    "logaddexp": lambda a, b, da, db: _add(_mul(_share(a, b), da), _mul(_share(b, a), db)),
    "where": lambda c, a, b, dc, da, db: _where(c, da, db),
    "clamp": _of_clamped,
    **dict.fromkeys(("sign", "number", *TRUTHS), lambda *_: 0.0),
}

FUNCTIONS = frozenset(_RULES)


@functools.lru_cache(256)
def slope(term: Term, side: int) -> Term:
    """e of a side; 0 where nothing of the term is of its probabilities."""
    return _add(derivative(term, ("log p", side)), _mul(("p", side), derivative(term, ("p", side))))


@functools.lru_cache(256)
def derivative(term: Term, leaf: Term) -> Term:
    """That by a leaf alone, all others held."""
    known: dict[Term, Term] = {}

    def of(term: Term) -> Term:
        if isinstance(term, float):
            return 0.0
        if term not in known:
            name, *args = term
            own = name in LEAVES
            known[term] = float(term == leaf) if own else _RULES[name](*args, *map(of, args))
        return known[term]

    return of(term)


def added(terms: Iterable[tuple[float, Term]]) -> Term:
    """A sum of numbers times terms."""
    first, *others = sorted(terms, key=lambda term: term[0] < 0)
    return functools.reduce(_with, others, _with(0.0, first))


def _with(so_far: Term, term: tuple[float, Term]) -> Term:
    c, own = term
    scaled = own if abs(c) == 1 else abs(c) if own == 1 else ("mul", abs(c), own)
    return _add(so_far, scaled) if c >= 0 else _sub(so_far, scaled)


def exp(term: Term) -> Term:
    """A probability, where it is that of its logarithm."""
    is_logarithm = isinstance(term, tuple) and term[0] == "log p"
    return ("p", term[1]) if is_logarithm else ("exp", term)  # type: ignore[index]


def logarithm(mixture: Iterable[tuple[int, float]]) -> Term:
    """Of sum_s w_s p_s, given (s, w_s), whose terms may all be 0 where a sum of their logits is not."""
    parts: list[Term] = [("log p", s) if w == 1 else ("sub", ("log p", s), -math.log(w)) for s, w in mixture]
    return functools.reduce(lambda a, b: ("logaddexp", a, b), parts)


def softplus(x: Term, beta: float, threshold: float) -> Term:
    """log(1 + exp(beta x)) / beta, and x itself where beta x is above a threshold, as torch has it."""
    scaled: Term = x if beta == 1 else ("mul", x, beta)
    bent: Term = ("logaddexp", scaled, 0.0)
    return "where", ("gt", scaled, threshold), x, bent if beta == 1 else ("div", bent, beta)


def binary_cross_entropy(x: Term, t: Term, held: Term) -> Term:
    """That of a probability to a target, as torch has it, given the same through which no gradient flows.

    Its logarithms are -100 at the least, but its gradient is that of none below 1e-12.
    """
    log_x: Term = ("log p", held[1]) if isinstance(held, tuple) and held[0] == "p" else ("log", held)
    log_rest: Term = ("maximum", ("log1p", ("neg", held)), -100.0)
    value = "sub", ("mul", ("sub", t, 1.0), log_rest), ("mul", t, ("maximum", log_x, -100.0))
    spread = "maximum", ("mul", ("sub", 1.0, held), held), 1e-12
    return "add", value, ("mul", ("div", ("sub", held, t), spread), ("sub", x, held))


# What holds of terms


def parts(term: Term) -> Iterator[tuple[Any, ...]]:
    """The functions and leaves that a term is made of, each once."""
    seen: set[Term] = set()
    stack = [term]
    while stack:
        each = stack.pop()
        if isinstance(each, tuple) and each not in seen:
            seen.add(each)
            yield each
            if each[0] not in LEAVES:
                stack += each[1:]


def leaves_of(term: Term, *names: str) -> set[Term]:
    """Those of these names that a term is made of."""
    return {part for part in parts(term) if part[0] in names}


def places_of(term: Term, *names: str) -> list[int]:
    """Which sides, tensors or numbers of rows they are of."""
    return sorted({leaf[1] for leaf in leaves_of(term, *names)})  # type: ignore[index]


def sides_of(term: Term) -> set[int]:
    """The sides that a term is made of."""
    return set(places_of(term, *OF_SIDES))


def moves(term: Term) -> bool:
    """Whether a gradient may flow through it."""
    return bool(leaves_of(term, *OF_SIDES, "n"))


def has_softmax(term: Term) -> bool:
    """Whether it is made of probabilities, and not of logits alone."""
    return bool(leaves_of(term, "p", "log p"))


def is_long(term: Term) -> bool:
    """Whether it is made of too many terms. What is there twice counts twice: a square of squares doubles."""
    stack, count = [term], 0
    while stack and count <= MOST_TERMS:
        each = stack.pop()
        if isinstance(each, tuple):
            count += 1
            stack += () if each[0] in LEAVES else each[1:]
    return count > MOST_TERMS


def is_own(term: Term) -> bool:
    """Whether it is no multiple of a probability or of a logarithm by what no gradient flows through.

    Such are statistics.
    """
    by = (derivative(term, (name, s)) for s in sides_of(term) for name in OF_SIDES)
    return any(map(moves, by))


def replaced(term: Term, leaves: Mapping[Term, Term]) -> Term:
    """The same of other leaves."""
    if isinstance(term, float):
        return term
    name, *args = term
    return leaves.get(term, term) if name in LEAVES else (name, *(replaced(arg, leaves) for arg in args))


def is_true_or_false(term: Term) -> bool:
    return isinstance(term, tuple) and term[0] in TRUTHS
