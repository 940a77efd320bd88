"""Symbolic sizes as numbers: other ones than the example's, such as the guards allow.

What holds of a graph at the sizes of its example may hold by chance: a part of the rows that begins at a
symbol which is 0 there is all of them, and a column is as good as a row of one. A second look is taken where
no size, and no number that the graph makes of sizes, is what it was.
"""

from __future__ import annotations

import itertools
import operator
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import sympy
import torch

from ..common.compat.symbols import Symbols, symbols_of
from ..graph.shapes import Size

Values = dict[sympy.Symbol, sympy.Integer]
SizeOf = Callable[[Size], int]

_PLAIN = (5, 7, 11, 12, 13, 16, 17, 19, 24, 30)
_ATTEMPTS, _TRIES = 64, 100
_TAKEN = 3


class UnknownSize(Exception):
    """A size is no function of the symbols that were given values."""


def at(values: Values) -> SizeOf:
    """Sizes where symbols have these values."""

    def size_of(size: Size) -> int:
        if isinstance(size, int):
            return size
        value = _with(values, size.node.expr)
        if not value.is_Integer:
            raise UnknownSize(f"{size} at {values}")
        return int(value)

    return size_of


def other_sizes(sizes: Sequence[torch.SymInt]) -> list[SizeOf]:
    """Some ways to give sizes other values, those first that leave the fewest what they are.

    Of these, those first that leave the order of sizes what it is: a part that begins behind the last row is
    one more thing that is true by chance. An empty list where none were found that the guards allow.
    """
    hints = {size.node.expr: size.node.hint for size in sizes}
    search = _Search(symbols_of(sizes[0]), set().union(*(expr.free_symbols for expr in hints)))
    found: list[tuple[tuple[int, int], Values]] = []
    for seed in range(_ATTEMPTS):
        values = search.found(random.Random(seed))
        if values is not None:
            found.append((_likeness(hints, values), values))
        if sum(likeness == (0, 0) for likeness, _ in found) == _TAKEN:
            break
    found.sort(key=operator.itemgetter(0))
    return [at(values) for _, values in found[:_TAKEN]]


def _likeness(hints: Mapping[sympy.Basic, int | None], values: Values) -> tuple[int, int]:
    """(how many sizes stay what they are, how many pairs of them change places)"""
    numbers = {expr: value for expr in hints if (value := _with(values, expr)).is_Integer}
    pairs = [(hint, numbers.get(expr, hint)) for expr, hint in hints.items() if hint is not None]
    turned = sum(a < b and not x < y for (a, x), (b, y) in itertools.permutations(pairs, 2))
    return sum(hint == value for hint, value in pairs), turned


class _Search:
    """Values of symbols, one symbol after another, all of them new."""

    def __init__(self, known: Symbols, wanted: set[sympy.Symbol]):
        self._known = known
        self._guards: defaultdict[sympy.Symbol, list[sympy.Basic]] = defaultdict(list)
        for guard in known.guards:
            for symbol in guard.free_symbols:
                self._guards[symbol].append(guard)
        self._symbols = sorted(_connected(wanted, self._guards), key=str)
        self._usual = {symbol: self._usual_candidates(symbol) for symbol in self._symbols}

    def _usual_candidates(self, symbol: sympy.Symbol) -> list[int]:
        """Small numbers, and those near the example and near what guards name."""
        guards, hint = self._guards[symbol], self._known.hints.get(symbol)
        named = {int(c) for guard in guards for c in guard.atoms(sympy.Integer) if c > 1}
        known = named if hint is None else {*named, hint}
        multiples = {k * c for k in (2, 3, 5, 7) for c in known}
        near = {c + step for step in (1, -1, 2, -2, 3, 4, 5, 8, 16, 64) for c in known}
        return self._possible(symbol, {*_PLAIN, *multiples, *near})

    def _possible(self, symbol: sympy.Symbol, values: set[int]) -> list[int]:
        least, most = self._known.ranges.get(symbol, (None, None))
        least = 2 if least is None else max(least, 2)
        possible = {value for value in values if value >= least and (most is None or value <= most)}
        return sorted(possible - {self._known.hints.get(symbol)})

    def found(self, chance: random.Random) -> Values | None:
        """The first values that are found in some random order."""
        tries = itertools.count()
        return self._extended({}, self._symbols, lambda: next(tries) < _TRIES, chance)

    def _extended(
        self, values: Values, left: list[sympy.Symbol], goes_on: Callable[[], bool], chance: random.Random
    ) -> Values | None:
        if not left:
            return values
        symbol, *rest = left
        candidates = self._candidates(symbol, values)
        for value in chance.sample(candidates, len(candidates)):
            if not goes_on():
                return None
            extended = {**values, symbol: sympy.Integer(value)}
            if all(_may_hold(guard, extended) for guard in self._guards[symbol]):
                made = self._extended(extended, rest, goes_on, chance)
                if made is not None:
                    return made
        return None

    def _candidates(self, symbol: sympy.Symbol, values: Values) -> list[int]:
        """The usual ones, or what an equation leaves."""
        for guard in self._guards[symbol]:
            if isinstance(guard, sympy.Eq):
                value = _solved(_with(values, guard), symbol)
                if value is not None:
                    return self._possible(symbol, {value})
        return self._usual[symbol]


def _connected(
    wanted: set[sympy.Symbol], guards: Mapping[sympy.Symbol, list[sympy.Basic]]
) -> set[sympy.Symbol]:
    """Symbols with those that guards bring together with them."""
    found: set[sympy.Symbol] = set()
    stack = list(wanted)
    while stack:
        symbol = stack.pop()
        if symbol not in found:
            found.add(symbol)
            stack += {other for guard in guards[symbol] for other in guard.free_symbols}
    return found


def _with(values: Values, expr: sympy.Basic) -> sympy.Basic:
    """An expression where symbols have these values; NaN where it divides by 0."""
    try:
        return expr.xreplace(values)
    except ZeroDivisionError:
        return sympy.nan


def _may_hold(guard: sympy.Basic, values: Values) -> bool:
    """Whether a guard holds, or has symbols left."""
    return not guard.free_symbols <= values.keys() or _with(values, guard) == sympy.true


def _solved(guard: sympy.Basic, symbol: sympy.Symbol) -> int | None:
    """The value that an equation gives to its one symbol, where it is linear."""
    if not isinstance(guard, sympy.Eq) or guard.free_symbols != {symbol}:
        return None
    difference = sympy.expand(operator.sub(*guard.args))
    slope = difference.coeff(symbol)
    rest = difference - slope * symbol
    if slope == 0 or rest.free_symbols:
        return None
    value = -rest / slope
    return int(value) if value.is_Integer else None
