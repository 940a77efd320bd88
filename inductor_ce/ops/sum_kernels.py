"""Sums over rows of which the device alone knows how many count, in Triton. Imported where there is Triton.

`left` as in `counted_kernels`: an int32 on the device, or a number.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .counted_kernels import MOST_PARTS
from .launch import Kernel, cdiv

COLUMNS, ROWS_OF_SUMS, PARTS = 64, 128, 4
OFTEN, WIDTH, ROWS, WARPS = 128, 128, 64, 8  # a tile of `frequent_rows`
SUMMED = 1024  # elements of a sum of parts


def frequent_rows(
    made: Tensor,
    kept: Tensor,
    rows: Tensor,
    order: Tensor | None,
    counted: Tensor | None,
    left: Tensor | int,
    room: Tensor | None = None,
) -> None:
    """What `counted.frequent_rows` returns, of 16-bit factors, with sums in float32.

    Parts of sums go to `room`, of `room_of_frequent_rows`, if that is given.
    """
    (r, m), n = made.shape, len(rows)
    if not n:
        made.zero_()
        return
    columns, blocks, parts = _tiles(n, r, m)
    room = made.new_empty(room_of_frequent_rows(n, r, m)) if room is None else room
    grid, strides = (blocks, parts, 1), (kept.stride(0), rows.stride(0), rows.stride(1))
    which = (0, 0) if order is None or counted is None else (order, counted)
    given, sizes = (room, kept, rows, *which, left), (n, r, m, parts)
    tile = columns, WIDTH, ROWS
    flags = isinstance(left, Tensor), order is not None
    _frequent(grid, given, *sizes, *strides, *flags, *tile, num_warps=WARPS)
    _sum_parts((cdiv(r * m, SUMMED), 1, 1), (made, room), r * m, parts, SUMMED)


def room_of_frequent_rows(n: int, r: int, m: int) -> int:
    """How many numbers in float32 `frequent_rows` [R, M] of n rows needs for a time."""
    _, _, parts = _tiles(n, r, m)
    return parts * r * m


def _tiles(n: int, r: int, m: int) -> tuple[int, int, int]:
    """(rows of a tile of [R, M], how many tiles there are, and parts of the sum of each)"""
    columns = min(OFTEN, max(16, 1 << (r - 1).bit_length()))
    blocks = cdiv(r, columns) * cdiv(m, WIDTH)
    return columns, blocks, min(max(MOST_PARTS // blocks, 1), cdiv(n, ROWS))


@Kernel
@triton.jit(do_not_specialize_on_alignment=["left"])
def _frequent(
    parts,
    kept,
    rows,
    order,
    counted,
    left,
    n,
    r,
    m,
    count,
    kept_row,
    row,
    column,
    ON_DEVICE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    # A part is of rows that lie next to each other in the order; some of the last parts may have none.
    limit = left
    if ON_DEVICE:
        limit = tl.maximum(tl.load(left), 0)
    limit = tl.minimum(limit, n)
    part, blocks = tl.program_id(1), tl.cdiv(m, M)
    c = tl.program_id(0) // blocks * R + tl.arange(0, R)
    j = tl.program_id(0) % blocks * M + tl.arange(0, M)
    share = tl.cdiv(tl.cdiv(limit, K), count) * K
    total = tl.zeros([R, M], tl.float32)
    for start in range(part * share, tl.minimum(part * share + share, limit), K):
        i = start + tl.arange(0, K)
        here = i < limit
        source = i.to(tl.int64)
        if HAS_ORDER:
            source = tl.load(order + i, mask=here, other=0)
            here = here & (tl.load(counted + i, mask=here, other=0) != 0)
        place = kept + i.to(tl.int64)[None, :] * kept_row + c[:, None]
        entries = tl.load(place, mask=here[None, :] & (c < r)[:, None], other=0.0)
        place = rows + source[:, None] * row + j.to(tl.int64)[None, :] * column
        total = tl.dot(entries, tl.load(place, mask=here[:, None] & (j < m)[None, :], other=0.0), total)
    place = parts + (part.to(tl.int64) * r + c[:, None]) * m + j[None, :]
    tl.store(place, total, mask=(c < r)[:, None] & (j < m)[None, :])


@Kernel
@triton.jit
def _sum_parts(out, parts, size, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(count):
        total += tl.load(parts + part * size + i, mask=i < size, other=0.0)
    tl.store(out + i, total, mask=i < size)


def sums_over_rows(parts: Tensor, dz: Tensor, left: Tensor | int, accumulate: bool = False) -> None:
    """`parts` [P, V] become, or gain, sums that add up to that over the first `left` rows of dz [n, V]."""
    n, v = dz.shape
    if v:
        grid, on_device = (cdiv(v, COLUMNS), len(parts), 1), isinstance(left, Tensor)
        sizes = accumulate, len(parts), COLUMNS, ROWS_OF_SUMS
        _sum_rows(grid, (parts, dz, left), n, v, *dz.stride(), on_device, *sizes)


@Kernel
@triton.jit(do_not_specialize_on_alignment=["left"])
def _sum_rows(
    parts,
    dz,
    left,
    n,
    v,
    row,
    column,
    ON_DEVICE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    limit = left
    if ON_DEVICE:
        limit = tl.load(left)
    n = tl.minimum(limit, n)
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(tl.program_id(1) * ROWS, n, PARTS * ROWS):
        i = start + tl.arange(0, ROWS)
        place = dz + i.to(tl.int64)[:, None] * row + j.to(tl.int64)[None, :] * column
        total += tl.load(place, mask=(i < n)[:, None] & (j < v)[None, :], other=0.0).to(tl.float32)
    sums, place = tl.sum(total, 0), parts + tl.program_id(1) * v + j
    if ACCUMULATE:
        sums += tl.load(place, mask=j < v, other=0.0)
    tl.store(place, sums, mask=j < v)


def add_up(out: Tensor, parts: Tensor) -> None:
    """`out` [V] becomes the sum of `parts` [P, V]."""
    p, v = parts.shape
    if v:
        _sum_parts((cdiv(v, SUMMED), 1, 1), (out, parts), v, p, SUMMED)
