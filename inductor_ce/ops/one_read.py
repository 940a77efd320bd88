"""Statistics and gradient of logits that are read once, where nothing but numbers of each row lies between.

    row_stats_grad(z [N, V], labels, weights, which, given, program, chain)   -> ([K, N], dz [N, V])

It is `row_stats`, the coefficients that a `RowProgram` makes of each row's statistics and of what is given,
and `row_grad`; all of what a `Chain` makes of z, if there is one. `some_row_stats_grad` is the same for the
rows that count in a piece: see `counted.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import chains, row_program
from .chains import Chain
from .operators import packed_dtype_of, row_grad, row_stats, stats_dtype_of
from .row_program import RowProgram
from .rows import Row, Rows
from .table import SUM, SUMEXP


@torch.library.custom_op("inductor_ce::row_stats_grad", mutates_args=())
def row_stats_grad(
    z: Tensor,
    labels: list[Tensor],
    weights: list[Tensor],
    which: str,
    given: list[Tensor],
    program: str,
    *,
    chain: str = "",
) -> tuple[Tensor, Tensor]:
    """The statistics of `z`, and a gradient with respect to it that depends on them alone.

    Args:
        z, labels, weights, which: as for `row_stats`, of one label a row, and without `argmax`.
        given: numbers that the program reads, [N] or [].
        program: what makes the coefficients, a `RowProgram` as text.
        chain: a `Chain` as text; of what it makes of `z` the statistics are then, and the gradient is still
            with respect to `z`.

    Returns:
        [K, N] in the dtype of the statistics, and [N, V] in that of z.

    Raises:
        ValueError: wrong rank or dtype, unknown rows, or a program of other statistics or given numbers.
    """
    _check(labels, weights, which, given, program)
    of = chains.decode(chain)
    wide = z if of is None else z.to(stats_dtype_of(z.dtype))
    number = row_program.number_beside(wide)
    x = z if of is None else of.of(wide, _call, number)
    packed = row_stats(x, labels, weights, which)
    coefficients = row_program.coefficients(row_program.decode(program), packed, given)
    dx = row_grad(x, labels, weights, packed[0], coefficients, which)
    return packed, dx if of is None else of.gradient(wide, dx, _call, number).to(z.dtype)


def _call(op: Any, args: tuple[Any, ...]) -> Tensor:
    return op(*args)


def _check(
    labels: list[Tensor], weights: list[Tensor], which: str, given: list[Tensor], program: str
) -> None:
    rows, of = Rows.decode(which, len(labels), len(weights)), row_program.decode(program)
    sizes = of.n_statistics, len(of.results), of.n_given
    if sizes != (len(rows), len(rows), len(given)) or any(x.dim() > 1 for x in given) or rows.told:
        raise ValueError(f"{program} is no program of {which!r} and {len(given)} numbers [N] or []")


@torch.library.custom_op("inductor_ce::some_row_stats_grad", mutates_args=())
def some_row_stats_grad(
    z: Tensor,
    labels: list[Tensor],
    weights: list[Tensor],
    which: str,
    given: list[Tensor],
    program: str,
    left: Tensor,
    piece: int,
    *,
    chain: str = "",
) -> tuple[Tensor, Tensor]:
    """As `row_stats_grad`; rows from left[piece] on need not be computed, and hold anything."""
    return row_stats_grad(z, labels, weights, which, given, program, chain=chain)


@row_stats_grad.register_fake
@some_row_stats_grad.register_fake
def _(
    z: Tensor,
    labels: list[Tensor],
    weights: list[Tensor],
    which: str,
    given: list[Tensor],
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor]:
    return row_stats(z, labels, weights, which), z.new_empty(z.shape)


GRADIENT = 1  # which of both results it is

VECTOR_BYTES = 16  # what a thread loads at a time


def is_offered(dtype: torch.dtype, row: int, rows: Rows) -> bool:
    """Whether the template makes these statistics of logits of this dtype, and faster than two.

    `row` is V, or how many elements lie between the first logits of two rows, if it may write them all.
    """
    narrow = packed_dtype_of(dtype, rows) == torch.float32
    return narrow and not (rows.has_first or rows.told or rows.several) and is_faster(dtype, row, rows)


def is_faster(dtype: torch.dtype, row: int, rows: Rows) -> bool:
    """Whether it was measured to be: with no sum but that of all, and rows that are whole vectors.

    On an H200, as a multiple of a copy of the logits, by one and by two: 1.2 and 1.5; with the sum 1.3 and
    1.6; with `sumexpz` 2.3 and 1.7, with `dot` 1.8 and 1.8; where a row has 50257, 2.8 and 1.8.
    """
    others = {row.statistic for row in rows.closed().sums_after_sumexp}
    return others <= {SUM} and row * dtype.itemsize % VECTOR_BYTES == 0


# The form in which graphs hold them.
ROW_STATS_GRAD = torch.ops.inductor_ce.row_stats_grad.default
SOME_ROW_STATS_GRAD = torch.ops.inductor_ce.some_row_stats_grad.default


class Given(NamedTuple):
    """A number that a program is given: its name, whether each row has its own, and what makes it a value."""

    name: str
    has_rows: bool
    cast: str

    @classmethod
    def of(cls, k: int, dtype: torch.dtype, has_rows: bool) -> Given:
        cast = " != 0" if dtype == torch.bool else ".to(tl.float32)" if dtype.is_floating_point else ""
        return cls(f"given_{k}", has_rows, cast)


@dataclass(frozen=True, repr=False)
class OneRead:
    """What the template is given beside the rows.

    Args:
        rows: the statistics.
        program: what makes the coefficients.
        given: the numbers that it is given.
        chain: what the statistics are of, if not of the logits themselves.
        narrow: whether these have 16 bits.
    """

    rows: Rows
    program: RowProgram
    given: tuple[Given, ...]
    chain: Chain | None = None
    narrow: bool = False

    def __repr__(self) -> str:
        """A literal: what a template is given is a constant of its code too."""
        parts = self.rows.encode(), self.program.encode(), [tuple(x) for x in self.given], self.chain
        return repr(parts)

    def before(self, x: str) -> list[str]:
        """What makes of a variable, which is z, what the statistics are of."""
        return [] if self.chain is None else self.chain.lines_before(x, self.narrow)

    def after(self, z: str, dz: str) -> list[str]:
        """What makes of a variable, which is the gradient by that, the gradient by z."""
        return [] if self.chain is None else self.chain.lines_after(z, dz, self.narrow)

    @property
    def sums(self) -> list[Row]:
        """Those that are published beside the first, with all that combine with them."""
        return self.rows.closed().sums_after_sumexp

    @property
    def counts(self) -> bool:
        return any(row.is_beside_count for row in self.sums)

    @property
    def words(self) -> list[str]:
        return [f"word_{k}" for k in range(1 + len(self.sums))]

    def words_of_row(self, blocks: int) -> int:
        return len(self.words) * blocks + self.rows.labels

    @property
    def variables(self) -> list[str]:
        return [row.variable for row in self.sums]

    @property
    def statistics(self) -> list[str]:
        """Of the row, those in no place of the packed result by the names of their sums."""
        places = {row: f"s_{k}" for k, row in enumerate(self.rows)}
        picks = [f"s_{k}" for k, _ in self.rows.hits]
        return [places[Row(SUMEXP)], *(places.get(row, f"{row.variable}_row") for row in self.sums), *picks]

    @property
    def moved(self) -> list[str]:
        return ["moved_d", *(f"moved_{name}" for name in self.variables)]

    @property
    def picked(self) -> list[str]:
        return [f"pick_{j}" for j in range(self.rows.labels)]

    # A load is written once per input name, so what is loaded in several places has as many.

    @property
    def picks(self) -> list[str]:
        return [f"z_pick_{j}" for j in range(self.rows.labels)]

    @property
    def logits_again(self) -> list[str]:
        return _twice(self.picks)

    @property
    def weights_of_sums(self) -> dict[int, str]:
        """The names of those that sums read, by which they are."""
        names = self.rows.weight_names
        return {row.index: names[row.index] for row in self.sums if row.index is not None}

    @property
    def weights_again(self) -> list[str]:
        return [f"{name}_again" for name in self.rows.weight_names]

    @property
    def weights(self) -> list[str]:
        return [*_twice([*self.weights_of_sums.values()]), *self.weights_again]

    @property
    def weights_read(self) -> list[int]:
        """Which weight each of these is."""
        of_sums = [*self.weights_of_sums]
        return [*of_sums, *of_sums, *range(len(self.weights_again))]


def _twice(names: list[str]) -> list[str]:
    """Those of what each program reads, and of what it reads in the place of others."""
    return [*names, *(f"{name}_help" for name in names)]
