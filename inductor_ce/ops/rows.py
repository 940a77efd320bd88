"""Rows: the statistics of the table that one `row_stats` packs, and how they combine.

NOTE The law. A sum over a block of columns is moved to the maximum of the whole row, which is `rise` above
the block's: gap becomes gap + rise and exp becomes exp e^rise, so that

    moved = (own + beside rise) e^rise,     the factor where the terms have exp, `beside` where they have gap,

with e^(k rise) for a power, and the sums add up. `beside` is the same sum without gap: the number of
columns, sumexp, or a mass.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch

from .law import Law, Move
from .table import (
    ALWAYS,
    ARGMAX,
    COUNT,
    FIRST,
    MASS,
    MAXIMUM,
    OPTIONAL,
    PICK,
    PICKS,
    POWER,
    SUM,
    SUMEXP,
    WEIGHED,
    Per,
    Statistic,
)
from .terms import in_triton


@dataclass(frozen=True)
class Row:
    """A statistic, and of which label or weight tensor, or of which order it is, if of any.

    One of several labels a row has `width` places in the packed result, and comes last.
    """

    statistic: Statistic
    index: int | None = None
    order: float | None = None
    width: int = 1

    def __str__(self) -> str:
        name = self.statistic.name
        if self.order is not None:
            return f"{name}{int(self.order) if self.order.is_integer() else self.order}"
        if self.statistic == PICKS:
            return f"{name}{self.width}"
        return f"{name}:{self.index}" if self.statistic.per is Per.WEIGHT else name

    @staticmethod
    def power(text: str) -> Row | None:
        """The row that is written so, if it is a power."""
        name, caret, number = text.partition("^")
        if name + caret != POWER.name or not 0 < (order := float(number)) < math.inf:
            return None
        return Row(POWER, order=order)

    @staticmethod
    def picks(text: str, index: int) -> Row | None:
        """The row that is written so, if it is of several labels a row."""
        name, star, number = text.partition("*")
        if name + star != PICKS.name or not number.isdecimal() or not int(number):
            return None
        return Row(PICKS, index, width=int(number))

    @property
    def is_sum(self) -> bool:
        return self.statistic.term is not None

    @property
    def slope(self) -> str:
        """Of a row that has one."""
        assert self.statistic.slope is not None
        return self.statistic.slope

    @property
    def is_maximum(self) -> bool:
        return self.statistic.held == MAXIMUM

    # In the templates

    @property
    def variable(self) -> str:
        """A lane's part of the sum; sumexp's is in any case."""
        return "d" if self.statistic == SUMEXP else re.sub(r"\W", "_", f"sum_{self}")

    @property
    def beside_variable(self) -> str:
        beside = self.beside
        return "seen" if self.is_beside_count else "" if beside is None else beside.variable

    @property
    def is_beside_count(self) -> bool:
        return self.statistic.beside == COUNT

    @property
    def triton_term(self) -> str:
        return in_triton(self.statistic.term or "", self.order)

    @property
    def triton_slope(self) -> str:
        return in_triton(self.slope, self.order)

    @property
    def is_infinite_at_minus_infinity(self) -> bool:
        """Whether the term is infinite, or NaN, where gap is -inf, as in columns that are dropped."""
        return self.statistic.beside is not None and not self.statistic.has_exp

    @property
    def beside(self) -> Row | None:
        """The row that meets the rise, where one does; for COUNT there is none."""
        known = {s.name: s for s in (*ALWAYS, *WEIGHED)}
        statistic = known.get(self.statistic.beside or "")
        return None if statistic is None else Row(statistic, self.index)


@dataclass(frozen=True, repr=False)
class Rows:
    """The rows of a packed result [K, N], in its order."""

    rows: tuple[Row, ...]

    @staticmethod
    def of(n_labels: int, *others: Row) -> Rows:
        """Those of every call, with so many tensors of one label a row, and `others`, in any order."""
        order = [statistic.name for statistic in (*OPTIONAL, POWER, *WEIGHED, PICKS)]

        def place(row: Row) -> tuple[bool, int, int, float]:
            index = -1 if row.index is None else row.index
            return row.statistic == PICKS, index, order.index(row.statistic.name), row.order or 0.0

        picks = [Row(PICK, j) for j in range(n_labels)]
        return Rows((*map(Row, ALWAYS), *picks, *sorted(others, key=place)))

    @staticmethod
    def decode(text: str, n_labels: int, n_weights: int = 0, of_gradient: bool = False) -> Rows:
        """The rows of an operator's argument `which`; `row_grad` has a label more for each that is `told`.

        Raises:
            ValueError: a row is unknown, misplaced or missing.
        """
        names = text.split(",")
        if of_gradient:
            n_labels -= sum(s.name in names for s in OPTIONAL if s.at is not None)
        wide = [name for name in names if name.startswith(PICKS.name)]
        n_labels -= len(wide)
        several = [row for j, name in enumerate(wide) if (row := Row.picks(name, n_labels + j)) is not None]
        weighed = [[Row(s, j) for s in WEIGHED if str(Row(s, j)) in names] for j in range(n_weights)]
        optional = [Row(s) for s in OPTIONAL if s.name in names]
        optional += [row for name in dict.fromkeys(names) if (row := Row.power(name)) is not None]
        rows = Rows.of(n_labels, *optional, *itertools.chain(*weighed), *several)
        told = all(s.at is None or s.at in names for s in OPTIONAL if s.name in names)
        if rows.encode() != text or not all(weighed) or not told:
            raise ValueError(
                f"which={text!r} with {n_labels} label tensor(s) and {n_weights} weight tensor(s); expected "
                f"'max,sumexp' + ',pick' per label tensor"
                + "".join(f" [+ ',{s.name}']" for s in OPTIONAL)
                + f" [+ ',{POWER.name}k' per order k]"
                + " + some of "
                + " ".join(f"',{s.name}:j'" for s in WEIGHED)
                + " per weight tensor j"
                + f" [+ ',{PICKS.name}K' per tensor of K labels a row]"
            )
        return rows

    def encode(self) -> str:
        return ",".join(map(str, self.rows))

    def __repr__(self) -> str:
        """A literal: what a template is given is a constant of its code too."""
        return repr(self.encode())

    def __len__(self) -> int:
        """Of the packed result."""
        return sum(row.width for row in self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __contains__(self, statistic: Statistic) -> bool:
        return any(row.statistic == statistic for row in self.rows)

    def index(self, statistic: Statistic, index: int | None = None) -> int:
        """The place of a row."""
        return self.rows.index(Row(statistic, index))

    @property
    def widths(self) -> list[int]:
        """How many places in the packed result each has."""
        return [row.width for row in self.rows]

    @property
    def first_of_several(self) -> int:
        """The first place of the rows of several labels, or the end."""
        return len(self.rows) - sum(row.statistic == PICKS for row in self.rows)

    @property
    def picks(self) -> int:
        """How many tensors there are of one label a row."""
        return sum(row.statistic == PICK for row in self.rows)

    @property
    def labels(self) -> int:
        """How many label tensors there are."""
        return self.picks + len(self.several)

    @property
    def several(self) -> list[tuple[int, int, int]]:
        """(first place, label tensor, K) for each row of several labels."""
        places = itertools.accumulate(self.widths, initial=0)
        rows = zip(places, self.rows, strict=False)
        return [(k, row.index or 0, row.width) for k, row in rows if row.statistic == PICKS]

    @property
    def hits(self) -> list[tuple[int, int]]:
        """(row, label) for each of one label: those given, and then the columns that `at` tells."""
        given = [(self.rows.index(row), row.index or 0) for row in self.rows if row.statistic == PICK]
        return given + [(k, self.labels + i) for i, (k, _) in enumerate(self.told)]

    @property
    def has_first(self) -> bool:
        return any(row.statistic.held == FIRST for row in self.rows)

    # In the templates

    @property
    def label_names(self) -> list[str]:
        return [f"labels_{j}" for j in range(self.labels)]

    @property
    def hit_names(self) -> list[str]:
        return [f"labels_{j}" for j in range(self.labels + len(self.told))]

    @property
    def weight_names(self) -> list[str]:
        weights = {row.index for row in self.rows if row.statistic.per is Per.WEIGHT}
        return [f"weights_{j}" for j in range(len(weights))]

    @property
    def weight_tail_names(self) -> list[str]:
        return [f"{name}_tail" for name in self.weight_names]

    @property
    def sums_after_sumexp(self) -> list[Row]:
        return [row for _, row in self.sums if row.statistic != SUMEXP]

    @property
    def after_labels(self) -> list[tuple[int, Row]]:
        after = enumerate(self.rows[len(ALWAYS) + self.picks :], len(ALWAYS) + self.picks)
        return [(k, row) for k, row in after if row.statistic != PICKS]

    # Of the gradient

    @property
    def told(self) -> list[tuple[int, int]]:
        """(row, row that tells its column) for each row whose gradient is that of one column."""
        names = {row.statistic.name: k for k, row in enumerate(self.rows)}
        return [(k, names[at]) for k, row in enumerate(self.rows) if (at := row.statistic.at) is not None]

    @property
    def has_more(self) -> bool:
        """Whether a sweep holds more than the maximum, sumexp and a sum."""
        return any(row.statistic not in (*ALWAYS, PICK, PICKS, SUM) for row in self.rows)

    @property
    def cancel(self) -> bool:
        """Whether gradients are small differences of sums, which are then held in float64.

        NOTE Powers cancel. sum_i p_i^2 has the gradient 2 p_i (p_i - sum_j p_j^2); in a row that is sure of
        one class both are near 1. Torch takes the difference of probabilities that are rounded alike; two
        sums are each rounded for themselves.
        """
        return POWER in self

    @property
    def slopes(self) -> list[tuple[int, Row]]:
        """The rows with a gradient in every column, but for sumexp, each with its place."""
        return [(k, row) for k, row in self.sums if row.statistic != SUMEXP and row.statistic.slope]

    @property
    def sums(self) -> list[tuple[int, Row]]:
        """The sums, each with its place."""
        return [(k, row) for k, row in enumerate(self.rows) if row.is_sum]

    def closed(self, known: Container[int] = ()) -> Rows:
        """With all rows that these combine beside, but the masses that are known."""
        rows: list[Row] = []
        for row in self.rows:
            rows.append(row)
            beside = row.beside
            is_known = beside is not None and beside.statistic == MASS and beside.index in known
            if beside is not None and beside not in self.rows and not is_known:
                rows.append(beside)
        return Rows(tuple(rows))

    def law(self, known: Container[int] = ()) -> Law:
        """How they combine, where the masses of the weights `known` are."""
        places = {row: k for k, row in enumerate(self.rows)}
        moves = []
        for row in self.rows[: self.first_of_several]:
            beside = row.beside
            mass = beside.index if beside is not None and beside not in places else None
            place = None if beside is None else places.get(beside)
            order = (row.order or 1.0) if row.statistic.has_exp else None
            moves.append(Move(row.statistic.held, order, row.is_beside_count, place, mass))
        first = places.get(Row(ARGMAX))
        several = len(self) - self.first_of_several
        return Law(tuple(moves), first, tuple(at for _, at in self.told), several)


@torch.compiler.assume_constant_result
def law_of(which: str, n_labels: int, n_weights: int, known: tuple[int, ...]) -> Law:
    """The law of the rows of an operator's argument `which`."""
    return Rows.decode(which, n_labels, n_weights).law(known)
