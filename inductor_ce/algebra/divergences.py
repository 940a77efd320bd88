"""Divergences: what is summed over the classes of several rows of logits, each with a softmax of its own.

Of each of the rows, the *sides* 0, 1, ..., there are the probabilities p_s and their logarithms, and of a
mixture m = sum_s w_s p_s, whose weights sum to one, the logarithm. A *joint* value is a sum of c r b, with c
a number, r a product of numbers that the user brings along for each row, and b one of 1, p_s, log m and
p_s log m; a side alone is a mixture of one. What cannot be written so is None, never an exception.

Summed over the classes it is a `Divergence`, sum_i sum_u p_u L_u with L_u = k_u + sum_t A_ut log p_t +
sum_k B_uk log m_k. With T_k = sum_u B_uk p_u, its gradient with respect to the logits of side u is

    g_u - p_u sum_i g_u,   g_u = p_u L_u + sum_s A_su p_s + sum_k w_ku p_u T_k / m_k.

Where B_uk is the same multiple of w_ku for all u, as in a Jensen-Shannon divergence, T_k / m_k is that
multiple, which the projection takes away.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Mixture = tuple[tuple[int, float], ...]

# Numbers that differ by this part of the larger are meant to be the same: they were computed in float64.
_ROUNDING = 1e-12

MOST_SIDES = 8


class Entry(NamedTuple):
    """p_s for s = `side`, the logarithm of the mixture `log`, and the numbers of `rows`; None for neither."""

    side: int | None = None
    log: Mixture | None = None
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Joint:
    """sum of number * entry."""

    terms: tuple[tuple[Entry, float], ...]

    @staticmethod
    def of(terms: Iterable[tuple[Entry, float]]) -> Joint:
        """Terms gathered, and dropped where they cancel."""
        gathered: dict[Entry, list[float]] = defaultdict(list)
        for entry, c in terms:
            gathered[entry].append(c)
        sums = {entry: math.fsum(parts) for entry, parts in gathered.items()}
        kept = {e: c for e, c in sums.items() if abs(c) > _ROUNDING * max(map(abs, gathered[e]))}
        return Joint(tuple(sorted(kept.items(), key=repr)))

    @property
    def sides(self) -> set[int]:
        """Those that it is made of."""
        mixed = {s for entry, _ in self.terms for s, _ in entry.log or ()}
        return mixed | {entry.side for entry, _ in self.terms if entry.side is not None}

    @property
    def has_mixture(self) -> bool:
        """Whether it has the logarithm of a mixture, of more sides than one."""
        return any(len(entry.log or ()) > 1 for entry, _ in self.terms)

    @property
    def is_number(self) -> bool:
        return all(entry == Entry() for entry, _ in self.terms)

    def renamed(self, names: Mapping[int, int]) -> Joint:
        """The same of other sides."""

        def of(mixture: Mixture | None) -> Mixture | None:
            return mixture and tuple(sorted((names.get(s, s), w) for s, w in mixture))

        return Joint.of(
            (Entry(None if e.side is None else names.get(e.side, e.side), of(e.log), e.rows), c)
            for e, c in self.terms
        )

    def weighed(self, row: int) -> Joint:
        """The same times a number of each row."""
        return Joint.of((e._replace(rows=tuple(sorted((*e.rows, row)))), c) for e, c in self.terms)

    def __add__(self, other: Joint) -> Joint:
        return Joint.of((*self.terms, *other.terms))

    def __neg__(self) -> Joint:
        return Joint(tuple((entry, -c) for entry, c in self.terms))


def number(c: float) -> Joint:
    return Joint.of([(Entry(), c)])


def probabilities(side: int) -> Joint:
    return Joint(((Entry(side), 1.0),))


def log_probabilities(side: int) -> Joint:
    return Joint(((Entry(log=((side, 1.0),)), 1.0),))


def added(values: Iterable[Joint]) -> Joint:
    return Joint.of(term for value in values for term in value.terms)


def minus(a: Joint, b: Joint) -> Joint:
    return a + -b


def times(a: Joint, b: Joint) -> Joint | None:
    """The product, of which no term has two probabilities or two logarithms; None also where one is 0."""
    if not a.terms or not b.terms:
        return None  # not 0 where the other is NaN
    products = []
    for e1, c1 in a.terms:
        for e2, c2 in b.terms:
            if (e1.side is not None and e2.side is not None) or (e1.log and e2.log):
                return None
            side = e1.side if e2.side is None else e2.side
            entry = Entry(side, e1.log or e2.log, tuple(sorted((*e1.rows, *e2.rows))))
            products.append((entry, c1 * c2))
    return Joint.of(products)


def exp(value: Joint) -> Joint | None:
    """exp(log m + c) = e^c sum_s w_s p_s."""
    logs = [entry for entry, c in value.terms if entry != Entry() and c == 1]
    if len(logs) != 1 or logs[0] != Entry(log=logs[0].log) or len(value.terms) > 2:
        return None
    others = [c for entry, c in value.terms if entry == Entry()]
    if len(others) + 1 != len(value.terms):
        return None
    factor = math.exp(math.fsum(others))
    return Joint.of((Entry(side), factor * w) for side, w in logs[0].log or ())


def log(value: Joint) -> Joint | None:
    """log sum_s w_s p_s, as that of the mixture plus a constant."""
    if not value.terms or any(entry != Entry(entry.side) or c <= 0 for entry, c in value.terms):
        return None
    if any(entry.side is None for entry, _ in value.terms):
        return None  # an epsilon is no part of a mixture
    mass = math.fsum(c for _, c in value.terms)
    weights = [(entry.side, _rounded(c / mass)) for entry, c in value.terms if entry.side is not None]
    mixture = tuple(sorted(weights))
    constant = math.log(mass)
    constants = [(Entry(), constant)] if abs(constant) > _ROUNDING else []
    return Joint.of([(Entry(log=mixture), 1.0), *constants])


def _rounded(weight: float) -> float:
    """One number for 0.3 and for exp(log(0.3)), as far as these differ by rounding."""
    return float(f"{weight:.15g}")


def log_sum(values: Iterable[Joint]) -> Joint | None:
    """log of the sum of exponentials."""
    terms: list[tuple[Entry, float]] = []
    for value in values:
        exponential = exp(value)
        if exponential is None:
            return None
        terms += exponential.terms
    return log(Joint.of(terms))


class Divergence(NamedTuple):
    """sum_i sum_u p_u L_u, see the top of this file, and of which sides gradients are wanted.

    Attributes:
        constants: k_u for each side.
        logs: A_ut for each side and side.
        mixtures: w_ku for each mixture and side.
        mixed: B_uk for each side and mixture.
        wanted: the sides.
    """

    constants: tuple[float, ...]
    logs: tuple[tuple[float, ...], ...]
    mixtures: tuple[tuple[float, ...], ...]
    mixed: tuple[tuple[float, ...], ...]
    wanted: tuple[int, ...]

    @property
    def sides(self) -> range:
        return range(len(self.constants))

    def has_terms(self, side: int) -> bool:
        """Whether L of a side is not 0."""
        return any((self.constants[side], *self.logs[side], *self.mixed[side]))

    @property
    def has_constants_alone(self) -> bool:
        """Whether it is a sum of probabilities, or L of some side is nothing but a number."""
        of_logs = [any((*self.logs[u], *self.mixed[u])) for u in self.sides]
        return not any(of_logs) or any(k and not has for k, has in zip(self.constants, of_logs, strict=True))

    def shares(self, side: int) -> list[int]:
        """The mixtures k of a side for which T_k / m_k is no constant."""
        return [k for k, w in enumerate(self.mixtures) if w[side] and not self._is_multiple(k)]

    def _is_multiple(self, k: int) -> bool:
        weights = self.mixtures[k]
        if any(self.mixed[s][k] and not w for s, w in enumerate(weights)):
            return False  # weighed by a side that stands in it as another one, detached
        ratios = [self.mixed[s][k] / w for s, w in enumerate(weights) if w]
        return all(abs(r - ratios[0]) <= _ROUNDING * abs(ratios[0]) for r in ratios)

    @property
    def summed(self) -> list[int]:
        """The sides whose gradients need a sum over the classes."""
        return [side for side in self.wanted if self.has_terms(side) or self.shares(side)]


def total(
    value: Joint, rows_of: Sequence[Hashable], wanted: Iterable[int]
) -> dict[tuple[int, ...], Divergence] | None:
    """The sum over the classes, by the numbers of rows that its parts are multiplied by.

    None for what has no probability to weigh it, and for log m weighed by a side that m has not: where all
    that m has is below the smallest number, log m is -inf, which a side of m would weigh by 0.

    Args:
        rows_of: of each side what is equal for those of the same rows, whether a gradient flows or not.
        wanted: the sides of which gradients are wanted.
    """
    parts: dict[tuple[int, ...], list[tuple[Entry, float]]] = defaultdict(list)
    for entry, c in value.terms:
        mixed = {rows_of[s] for s, _ in entry.log or ()}
        if entry.side is None or (entry.log and len(entry.log) > 1 and rows_of[entry.side] not in mixed):
            return None
        parts[entry.rows].append((entry, c))
    made = {rows: _divergence(terms, len(rows_of), tuple(wanted)) for rows, terms in parts.items()}
    return None if any(each.has_constants_alone for each in made.values()) else made


def _divergence(terms: list[tuple[Entry, float]], sides: int, wanted: tuple[int, ...]) -> Divergence:
    mixtures = sorted({e.log for e, _ in terms if e.log and len(e.log) > 1}, key=repr)
    constants = [0.0] * sides
    logs = [[0.0] * sides for _ in range(sides)]
    mixed = [[0.0] * len(mixtures) for _ in range(sides)]
    for entry, c in terms:
        assert entry.side is not None
        if entry.log is None:
            constants[entry.side] += c
        elif len(entry.log) == 1:
            logs[entry.side][entry.log[0][0]] += c
        else:
            mixed[entry.side][mixtures.index(entry.log)] += c
    weights = tuple(tuple(dict(m).get(s, 0.0) for s in range(sides)) for m in mixtures)
    return Divergence(tuple(constants), tuple(map(tuple, logs)), weights, tuple(map(tuple, mixed)), wanted)


def render(divergence: Divergence) -> str:
    """As text, for example `sum p*(log p - log q)`."""
    p, m = [*"pqrstuvw"], [f"m{k + 1 if k else ''}" for k in range(len(divergence.mixtures))]
    parts = []
    for u in divergence.sides:
        logs = [*zip(divergence.logs[u], p, strict=False), *zip(divergence.mixed[u], m, strict=True)]
        names = [(c, f"log {name}") for c, name in logs if c]
        names += [(divergence.constants[u], "")] if divergence.constants[u] else []
        if names:
            parts.append(_weighed(p[u], names))
    mixtures = [
        f"{name} = {_sum([(w, p[s]) for s, w in enumerate(weights) if w])}"
        for name, weights in zip(m, divergence.mixtures, strict=True)
    ]
    total = f"sum {' + '.join(parts)}".replace("+ -", "- ")
    return ", ".join([total, *mixtures])


def _weighed(p: str, terms: list[tuple[float, str]]) -> str:
    """A probability times a sum, of which a factor of all comes first."""
    scale = abs(terms[0][0]) if len({abs(c) for c, _ in terms}) == 1 else 1.0
    if len(terms) == 1:
        return f"{_coefficient(terms[0][0])}{p}*{terms[0][1]}"
    return f"{_coefficient(scale)}{p}*({_sum([(c / scale, name) for c, name in terms])})"


def _sum(terms: list[tuple[float, str]]) -> str:
    first, *rest = sorted(terms, key=lambda term: term[0] < 0)
    return "".join([_term(*first)] + [f" {'-' if c < 0 else '+'} {_term(abs(c), name)}" for c, name in rest])


def _term(c: float, name: str) -> str:
    return f"{_coefficient(c)}{name}" if name else f"{c:g}"


def _coefficient(c: float) -> str:
    return {1.0: "", -1.0: "-"}.get(c, f"{c:g}*")
