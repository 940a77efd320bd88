"""How packed results combine, in plain values: `rows` makes them, `combine` goes by them."""

from __future__ import annotations

from typing import NamedTuple


class Move(NamedTuple):
    """How the blocks of one row combine.

    Attributes:
        held: MAXIMUM or FIRST, for what is no sum.
        order: of the power of exp that the terms of the sum have, None where they have none.
        is_beside_count: whether the number of columns meets the rise of the maximum.
        beside: the row that meets it, by its place.
        mass: or the weight whose mass does, where that is no row.
    """

    held: str | None
    order: float | None
    is_beside_count: bool
    beside: int | None
    mass: int | None


class Law(NamedTuple):
    """How packed results of blocks combine, in plain values, which Dynamo traces in every release.

    Attributes:
        moves: one for each row that has one place.
        first: the row that is the first column with the maximum, if any.
        told: the rows whose columns alone have the gradient of others.
        several: how many places those of several labels have, which come last and add up.
    """

    moves: tuple[Move, ...]
    first: int | None
    told: tuple[int, ...]
    several: int = 0
