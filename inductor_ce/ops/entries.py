"""The formulas of `algebra.entries`, over tensors or in Inductor's loops.

Of each row there is the sum of a term over the classes, and for each side that is wanted that of its `slope`:
with them an entry's gradient needs nothing but the entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from ..algebra.entries import Entries, Term, slope
from .arithmetic import Arithmetic, Normalised

T = TypeVar("T")


class _Terms(Generic[T]):
    """Terms of the entries of some sides and tensors, each made once."""

    def __init__(self, do: Arithmetic[T], sides: Sequence[Normalised[T]], tensors: Sequence[T]):
        self._do = do
        self._known: dict[Term, T] = {("t", k): tensor for k, tensor in enumerate(tensors)}
        for u, side in enumerate(sides):
            self._known["log p", u], self._known["p", u] = side.logarithm_and_probability(do)

    def __call__(self, term: Term) -> T | float:
        if isinstance(term, float):
            return term
        if term not in self._known:
            name, *args = term
            self._known[term] = self._do.call(name, *map(self, args), like=self._known["p", 0])
        return self._known[term]

    def of_entries(self, term: Term) -> T:
        """The same; what is a number, for each entry."""
        made = self(term)
        return self._do.add(self._do.mul(self._known["p", 0], 0.0), made) if isinstance(made, float) else made


def sums(do: Arithmetic[T], which: Entries, sides: Sequence[Normalised[T]], tensors: Sequence[T]) -> list[T]:
    """The sum of the term, and for each side that needs one that of its slope."""
    terms = _Terms(do, sides, tensors)
    slopes = (slope(which.term, u) for u in which.summed)
    return [do.total(terms.of_entries(term)) for term in (which.term, *slopes)]


def gradients(
    do: Arithmetic[T],
    which: Entries,
    sides: Sequence[Normalised[T]],
    tensors: Sequence[T],
    totals: Sequence[T],
) -> list[T]:
    """Those of the sides that are wanted, for an upstream gradient of 1."""
    terms, of_side = _Terms(do, sides, tensors), dict(zip(which.summed, totals, strict=True))
    made = []
    for u in which.wanted:
        p = terms.of_entries(("p", u))
        if u in of_side:
            own = terms.of_entries(slope(which.term, u))
            made.append(do.sub(own, do.mul(p, do.over_classes(of_side[u]))))
        else:
            made.append(do.mul(p, 0.0))
    return made
