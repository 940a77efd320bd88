"""Triton kernels of labels: where they are, which are the most frequent, and sums over rows of each.

Letters as in `product_kernels.py`; K labels of each of N rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Kernel, cdiv

BITS = 10
TILE = 1 << BITS
KEYS_AT_ONCE = 16
MERGED_AT_ONCE = 32
TILES_AT_ONCE = 8
COUNTED_AT_ONCE = 2048
WIDTH = 1024


def find_runs(columns: Tensor, runs: Tensor, v: int, room: Tensor | None, *labels: Tensor) -> None:
    """What `label_products.most_frequent` returns. `room` is memory of `room_of_runs`, if it is given.

    NOTE Sort. A library's sort takes the host longer than all of this. Here tiles of the labels are sorted,
    by counting for each label those of its tile that come before it. How many of each other tile do is then
    found by bisection, and so where it comes among all, and how many are equal. That is quadratic in their
    number, and small beside a head of as many rows.

    NOTE Frequencies. Fewer than R classes are more frequent than the K N labels over R. So it is enough to
    count how many classes have each of the frequencies up to that, and how many have greater ones.
    """
    count, r = runs.shape[1], columns.shape[0]
    if not count:
        columns.fill_(-1)
        return
    n, bins = count // len(labels), count // r + 2
    tiles = cdiv(n, TILE)
    size = tiles * TILE * len(labels)
    room = runs.new_empty(room_of_runs(r, labels)) if room is None else room.view(torch.int32)
    block = _power_of_2(bins)
    for k, label in enumerate(labels):
        numbers = k * tiles * TILE, k * n, n, v, size, count, bins, label.stride(0)
        grid = (tiles * TILE // KEYS_AT_ONCE, 1, 1)
        _sort_tiles(grid, (label, room), *numbers, TILE, KEYS_AT_ONCE, block)
    grid, sizes = (size // MERGED_AT_ONCE, 1, 1), (BITS, MERGED_AT_ONCE, TILES_AT_ONCE)
    _merge_tiles(grid, (room, runs), count, v, size, bins, *sizes)
    grid, sizes = (cdiv(count, COUNTED_AT_ONCE), 1, 1), (COUNTED_AT_ONCE, block, _power_of_2(r))
    _take_frequent(grid, (room, runs, columns), count, r, size, bins, *sizes)


def room_of_runs(r: int, labels: Sequence[Tensor]) -> int:
    """How many numbers of 32 bits `find_runs` needs for a time."""
    n = labels[0].shape[0]
    return len(labels) * (2 * cdiv(n, TILE) * TILE + n) + n * len(labels) // max(r, 1) + 2


def _power_of_2(size: int) -> int:
    """The next; Triton's own function takes longer."""
    return 1 << (size - 1).bit_length()


# `room` has the labels in sorted tiles, all of them full; where these labels are; how frequent each of the
# sorted labels is that is the first of its class, else 0; and how many classes have each of the frequencies
# from 2 on.


@Kernel
@triton.jit
def _sort_tiles(
    label,
    room,
    start,
    place,
    n,
    v,
    size,
    count,
    bins,
    stride,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    BINS: tl.constexpr,
):
    first = tl.program_id(0) * KEYS
    tile = first // TILE * TILE
    i, j = first + tl.arange(0, KEYS), tile + tl.arange(0, TILE)
    key, other = _key(label, i, n, v, stride), _key(label, j, n, v, stride)
    is_before = other[None, :] < key[:, None] + (j[None, :] < i[:, None]).to(tl.int32)
    at = room + start + tile + tl.sum(is_before.to(tl.int32), 1)
    tl.store(at, key)
    tl.store(at + size, place + i)
    if first == 0:
        b = tl.arange(0, BINS)
        tl.store(room + 2 * size + count + b, tl.zeros_like(b), mask=b < bins)


@triton.jit
def _key(label, i, n, v, stride):
    """label[i]; V where that is none of the classes, and V + 1 beyond the labels."""
    y = tl.load(label + i * stride, mask=i < n, other=0).to(tl.int64)
    return tl.where(i >= n, v + 1, tl.where((y >= 0) & (y < v), y, v)).to(tl.int32)


@Kernel
@triton.jit
def _merge_tiles(
    room, runs, count, v, size, bins, BITS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr
):
    TILE: tl.constexpr = 1 << BITS
    i = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    key = tl.load(room + i)
    own = (i // TILE * TILE)[None, :]
    rank, first, length = i % TILE, tl.zeros_like(i), tl.zeros_like(i)
    for start in range(0, size, TILES * TILE):
        tile = (start + tl.arange(0, TILES) * TILE)[:, None]
        less = _how_many(room, tile, size, key[None, :], BITS)
        no_more = _how_many(room, tile, size, key[None, :] + 1, BITS)
        rank += tl.sum(tl.where(tile < own, no_more, tl.where(tile > own, less, 0)), 0)
        first += tl.sum(less, 0)
        length += tl.sum(no_more - less, 0)
    inside = rank < count
    tl.store(runs + rank, key, mask=inside)
    tl.store(runs + count + rank, tl.load(room + size + i), mask=inside)
    is_first = inside & (rank == first) & (key < v)
    lengths = room + 2 * size
    tl.store(lengths + rank, tl.where(is_first, length, 0), mask=inside)
    frequency = lengths + count + tl.minimum(length, bins - 1)
    tl.atomic_add(frequency, 1, mask=is_first & (length > 1), sem="relaxed")


@triton.jit
def _how_many(room, tile, size, key, BITS: tl.constexpr):
    """How many of each tile are less than each key."""
    found = tl.zeros_like(tile + key)
    inside = tile + tl.zeros_like(key) < size
    for i in tl.static_range(BITS):
        half = 1 << (BITS - 1 - i)
        other = tl.load(room + tile + found + (half - 1), mask=inside, other=2147483647)
        found += tl.where(other < key, half, 0)
    other = tl.load(room + tile + found, mask=inside, other=2147483647)
    return found + (other < key).to(tl.int32)


@Kernel
@triton.jit
def _take_frequent(
    room,
    runs,
    columns,
    count,
    r,
    size,
    bins,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    lengths = room + 2 * size
    b = tl.arange(0, BINS)
    classes = tl.load(lengths + count + b, mask=(b > 1) & (b < bins), other=0)
    since = tl.sum(classes, 0) - tl.cumsum(classes, 0) + classes  # that are no less frequent
    least = 1 + tl.sum(((b > 1) & (since >= r)).to(tl.int32), 0)
    most = r - tl.sum(tl.where(b > least, classes, 0), 0)  # that are taken of those as frequent as that
    # Each program counts all that are before its own.
    first = tl.program_id(0) * BLOCK
    i = tl.arange(0, BLOCK)
    more, equal = tl.zeros_like(i), tl.zeros_like(i)
    for start in range(0, first, BLOCK):
        length = tl.load(lengths + start + i)
        more += (length > least).to(tl.int32)
        equal += (length == least).to(tl.int32)
    i += first
    length = tl.load(lengths + i, mask=i < count, other=0)
    is_more, is_equal = (length > least).to(tl.int32), (length == least).to(tl.int32)
    more_before = tl.sum(more, 0) + tl.cumsum(is_more, 0) - is_more
    equal_before = tl.sum(equal, 0) + tl.cumsum(is_equal, 0) - is_equal
    column = more_before + tl.minimum(equal_before, most)
    is_taken = (is_more != 0) | ((is_equal != 0) & (equal_before < most))
    tl.store(columns + column, tl.load(runs + i, mask=is_taken, other=0).to(tl.int64), mask=is_taken)
    tl.store(runs + 2 * count + i, tl.where(is_taken, column, -1), mask=i < count)
    if first + BLOCK >= count:
        taken = tl.sum(more + is_more, 0) + tl.minimum(tl.sum(equal + is_equal, 0), most)
        c = tl.arange(0, COLUMNS)
        tl.store(columns + c, tl.full([COLUMNS], -1, tl.int64), mask=(c >= taken) & (c < r))


def add_rows(out: Tensor, runs: Tensor, entries: Tensor, rows: Tensor, often: Tensor) -> None:
    """What `label_products.complete` does."""
    (v, m), count = out.shape, runs.shape[1]
    if count:
        n = count // entries.shape[1]
        strides = *out.stride(), *entries.stride(), *rows.stride(), *often.stride()
        grid, given = (count, cdiv(m, WIDTH), 1), (out, runs, entries, rows, often)
        _add_rows(grid, given, v, m, n, count, rows.shape[0], *strides, WIDTH)


@Kernel
@triton.jit
def _add_rows(
    out,
    runs,
    entries,
    rows,
    often,
    v,
    m,
    n,
    count,
    all_rows,
    out_row_stride,
    out_stride,
    entry_row_stride,
    entry_stride,
    row_stride,
    stride,
    often_row_stride,
    often_stride,
    WIDTH: tl.constexpr,
):
    at = tl.program_id(0)
    own = tl.load(runs + at)
    before = tl.load(runs + at - 1, mask=at > 0, other=-1)
    if (own < v) & (own != before):
        column = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
        inside = column < m
        place_out = out + own.to(tl.int64) * out_row_stride + column * out_stride
        which = tl.load(runs + 2 * count + at)
        if which >= 0:
            place_often = often + which.to(tl.int64) * often_row_stride + column * often_stride
            total = tl.load(place_often, mask=inside, other=0.0).to(tl.float32)
        else:
            total = tl.zeros([WIDTH], tl.float32)
            following = own
            while following == own:
                place = tl.load(runs + count + at)
                for side in range(0, all_rows, n):
                    i = (side + place % n).to(tl.int64)
                    factor = tl.load(entries + i * entry_row_stride + place // n * entry_stride)
                    row = rows + i * row_stride + column * stride
                    total += factor * tl.load(row, mask=inside, other=0.0).to(tl.float32)
                at += 1
                following = tl.load(runs + at, mask=at < count, other=v)
            total += tl.load(place_out, mask=inside, other=0.0).to(tl.float32)
        tl.store(place_out, total.to(out.dtype.element_ty), mask=inside)
