"""The formulas of `algebra.entries`, over tensors or in Inductor's loops.

Of each row there is the sum of a term over the classes, for each side that is wanted that of its `slope`,
with which an entry's gradient needs nothing but the entry, and for each number of the row that moves that
of the derivative by it, which is its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from ..algebra.entries import Entries, Term, derivative, slope
from .arithmetic import Arithmetic, Operands

T = TypeVar("T")


class _Terms(Generic[T]):
    """Terms of the entries of some sides and tensors, and of numbers of rows, each made once."""

    def __init__(self, do: Arithmetic[T], which: Entries, given: Operands[T]):
        self._do = do
        self._known: dict[Term, T] = {("t", k): tensor for k, tensor in enumerate(given.tensors)}
        for u, side in enumerate(given.sides):
            self._known["z", u] = side.z
            self._known["log p", u], self._known["p", u] = side.logarithm_and_probability(do)
        for k, number in enumerate(given.numbers):
            leaf = ("n", k) if k < which.n_moving else ("c", k - which.n_moving)
            self._known[leaf] = do.as_entries(number, given.sides[0].z)

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


def sums(do: Arithmetic[T], which: Entries, given: Operands[T]) -> list[T]:
    """The sum of the term, those of the slopes of sides that need one, and of the derivatives by numbers."""
    terms = _Terms(do, which, given)
    slopes = [slope(which.term, u) for u in which.summed]
    slopes += [derivative(which.term, ("n", k)) for k in range(which.n_moving)]
    return [do.total(terms.of_entries(term)) for term in (which.term, *slopes)]


def gradients(do: Arithmetic[T], which: Entries, given: Operands[T], totals: Sequence[T]) -> list[T]:
    """Those of the sides that are wanted, for an upstream gradient of 1."""
    terms, of_side = _Terms(do, which, given), dict(zip(which.summed, totals, strict=True))
    made = []
    for u in which.wanted:
        p, own = terms.of_entries(("p", u)), slope(which.term, u)
        by_logit = derivative(which.term, ("z", u))
        if u in of_side:
            dz = terms.of_entries(own if by_logit == 0 else ("add", own, by_logit))
            made.append(do.sub(dz, do.mul(p, do.over_classes(of_side[u]))))
        else:
            made.append(do.mul(p, 0.0) if by_logit == 0 else terms.of_entries(by_logit))
    return made
