"""Rows whose columns come in blocks, one after another, and are brought together as they come.

    m' = max(m, max z_k)        s' = s exp(m - m') + sum_i exp(z_ki - m')        log(s) + m

A reference m, whatever it is made of, is a name. It must cancel: then a row is made of the logarithm of a sum
of exponentials over some blocks, of logits at labels, and of numbers. Nothing else is understood, so that a
block that is counted twice, or a reference that is added to one side alone, is no normaliser.

    Sum     a number, and names times numbers: references, Lse over blocks, Totals, Picks and Gathers
    Mass    sum over blocks k of exp(shift_k) sum_i exp(z_ki), each shift a Sum
    Factor  exp(Sum)
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Span(NamedTuple):
    """The labels from `first` up to `end`."""

    first: float = -math.inf
    end: float = math.inf

    def within(self, other: Span) -> bool:
        return other.first <= self.first and self.end <= other.end

    def meets(self, other: Span) -> bool:
        return max(self.first, other.first) < min(self.end, other.end)

    def both(self, other: Span) -> Span:
        return Span(max(self.first, other.first), min(self.end, other.end))

    def moved(self, by: float) -> Span:
        return Span(self.first + by, self.end + by)

    def complement(self) -> Span | None:
        """All other labels, where they have no gap."""
        if self.first == -math.inf:
            return Span(self.end)
        return Span(end=self.first) if self.end == math.inf else None


class Reading(NamedTuple):
    """An index that is a label, clamped to `bounds`, less `start`; nothing is said of labels not `known`."""

    start: int = 0
    bounds: Span = Span()
    known: Span = Span()


@dataclass(frozen=True)
class Reference:
    """A number of the row that must cancel; `key` tells it from others."""

    key: Hashable
    blocks: frozenset[Any]


@dataclass(frozen=True)
class Lse:
    """log sum exp over the columns of some blocks."""

    blocks: frozenset[Any]


@dataclass(frozen=True)
class Total:
    """The sum of the logits of a block."""

    block: Any

    @property
    def blocks(self) -> frozenset[Any]:
        return frozenset({self.block})


@dataclass(frozen=True)
class Gather:
    """The logit of a block at an index, which is one label or another less where the block begins."""

    block: Any
    readings: tuple[tuple[Any, Reading], ...]

    @property
    def blocks(self) -> frozenset[Any]:
        return frozenset({self.block})


class Piece(NamedTuple):
    """For labels of the span, the logit of a block at the label, clamped to `bounds`, less `start`."""

    block: Any
    start: int
    bounds: Span
    span: Span


@dataclass(frozen=True)
class Pick:
    """The logit at the label `y` in the block whose span has it, a number where none has."""

    y: Any
    pieces: tuple[Piece, ...]
    otherwise: float

    @property
    def blocks(self) -> frozenset[Any]:
        return frozenset(piece.block for piece in self.pieces)


@dataclass(frozen=True)
class Sum:
    terms: tuple[tuple[Any, float], ...] = ()
    number: float = 0

    @staticmethod
    def of(terms: Mapping[Any, float], number: float = 0) -> Sum:
        """A sum that equals any other of these terms; an infinite number leaves none beside it."""
        kept = {} if math.isinf(number) else {name: n for name, n in terms.items() if n}
        return Sum(tuple(sorted(kept.items(), key=lambda term: hash(term[0]))), number)

    @property
    def blocks(self) -> frozenset[Any]:
        return frozenset().union(*(name.blocks for name, _ in self.terms))

    @property
    def names(self) -> frozenset[Any]:
        return frozenset(name for name, _ in self.terms)

    def scaled(self, by: float) -> Sum:
        return Sum.of({name: n * by for name, n in self.terms}, self.number * by)

    def plus(self, other: Sum, times: float = 1) -> Sum:
        terms = dict(self.terms)
        for name, n in other.terms:
            terms[name] = terms.get(name, 0) + times * n
        return Sum.of(terms, self.number + times * other.number)

    def only(self, kind: type) -> Any:
        """What a sum is, if it is one name of a kind and nothing else."""
        if len(self.terms) != 1 or self.number or self.terms[0][1] != 1:
            return None
        name = self.terms[0][0]
        return name if isinstance(name, kind) else None

    @property
    def is_settled(self) -> bool:
        """Whether nothing in it must cancel yet."""
        return all(isinstance(name, (Lse, Pick, Total)) for name, _ in self.terms)


@dataclass(frozen=True)
class Mass:
    shifts: tuple[tuple[Any, Sum], ...]

    @property
    def blocks(self) -> frozenset[Any]:
        return frozenset(block for block, _ in self.shifts).union(*(s.blocks for _, s in self.shifts))

    @property
    def names(self) -> frozenset[Any]:
        own = (Lse(frozenset({block})) for block, _ in self.shifts)
        return frozenset(own).union(*(shift.names for _, shift in self.shifts))

    def shifted(self, by: Sum) -> Mass:
        return Mass(tuple((block, shift.plus(by)) for block, shift in self.shifts))


@dataclass(frozen=True)
class Factor:
    log: Sum

    @property
    def blocks(self) -> frozenset[Any]:
        return self.log.blocks

    @property
    def names(self) -> frozenset[Any]:
        return self.log.names


Row = Sum | Mass | Factor
ZERO = Sum()


def name(what: Any) -> Sum:
    return Sum.of({what: 1})


def add(a: Row, b: Row, times: float = 1) -> Row | None:
    """a + times * b; None where that is no number of rows that can be named."""
    if isinstance(a, Sum) and isinstance(b, Sum):
        together = _picks_together(a, b) if times == 1 else None
        return a.plus(b, times) if together is None else together
    if ZERO in (a, b) and times == 1:
        return b if a == ZERO else a
    if not isinstance(a, Mass) or not isinstance(b, Mass) or times != 1:
        return None
    known = dict(a.shifts)
    return None if any(block in known for block, _ in b.shifts) else Mass((*a.shifts, *b.shifts))


def multiply(a: Row, b: Row) -> Row | None:
    """a * b: a mass moved by a factor, two factors, or a sum times a number; None for any other."""
    if ZERO in (a, b):
        return ZERO
    if isinstance(a, Factor):
        a, b = b, a
    if isinstance(b, Factor):
        if isinstance(a, Factor):
            return Factor(a.log.plus(b.log))
        return a.shifted(b.log) if isinstance(a, Mass) else None
    if isinstance(a, Sum) and not a.terms:
        a, b = b, a
    return a.scaled(b.number) if isinstance(a, Sum) and isinstance(b, Sum) and not b.terms else None


def exponential(row: Row) -> Row | None:
    """exp of a row; that of a normaliser has the mass of its blocks."""
    if not isinstance(row, Sum):
        return None
    if row.number == -math.inf:
        return ZERO
    normalisers = [each for each, n in row.terms if isinstance(each, Lse) and n == 1]
    if len(normalisers) != 1:
        return Factor(row) if row.terms else None
    shift = row.plus(name(normalisers[0]), -1)
    return Mass(tuple((block, shift) for block in normalisers[0].blocks))


def logarithm(row: Row) -> Sum | None:
    """log of a row: of a mass, where all of its blocks are shifted alike."""
    if isinstance(row, Factor):
        return row.log
    if row == ZERO:
        return Sum(number=-math.inf)
    if not isinstance(row, Mass):
        return None
    shifts = {shift for _, shift in row.shifts}
    return shifts.pop().plus(name(Lse(frozenset(dict(row.shifts))))) if len(shifts) == 1 else None


def chosen(y: Any, span: Span, gathered: Sum, otherwise: Sum) -> Sum | None:
    """What is gathered for labels y of a span, and a number, or what other blocks have, for all others."""
    gather = gathered.only(Gather)
    reading = None if gather is None else dict(gather.readings).get(y)
    if reading is None or not span.within(reading.known):
        return None
    piece = Piece(gather.block, reading.start, reading.bounds, span)
    rest = otherwise.only(Pick)
    if rest is None:
        return None if otherwise.terms else name(Pick(y, (piece,), otherwise.number))
    return _with(rest, y, (piece,))


def _with(pick: Pick, y: Any, pieces: tuple[Piece, ...]) -> Sum | None:
    if pick.y is not y or any(a.span.meets(b.span) for a in pick.pieces for b in pieces):
        return None
    return name(Pick(y, (*pick.pieces, *pieces), pick.otherwise))


def _picks_together(a: Sum, b: Sum) -> Sum | None:
    """The sum of picks in different blocks, one of which at most is other than 0 in each row."""
    one, other = a.only(Pick), b.only(Pick)
    if one is None or other is None or one.otherwise or other.otherwise:
        return None
    return _with(one, other.y, other.pieces)
