"""Triton kernels of what products.py adds to matrix products, for GPUs. Imported where there is Triton.

Letters: n rows of a piece, N of the whole, V columns, M width of the gradient. A label is any integer; one
that is none of 0..V - 1 stands for nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Kernel, cdiv

LABELS_AT_ONCE = 32
COLUMNS_AT_ONCE = 128
WIDTH = 1024
ROWS_AT_ONCE = 32
COUNTED_AT_ONCE = 2048
PIECES_AT_ONCE = 64


def take_out(
    dz: Tensor, label: Tensor, columns: Tensor, kept: Tensor, place: int, left: Tensor | int
) -> None:
    """Into row i of `kept` [n, W] go the columns [R] of row i of dz [n, V], one after another from the first.

    Then at `place` goes the entry at the label [n], which becomes 0 in dz. Of dz the first `left` rows are
    looked at; for others all of these are 0.
    """
    n, v = dz.shape
    if n:
        grid, given = (cdiv(n, LABELS_AT_ONCE), 1, 1), (dz, label, columns, kept, left)
        strides = *dz.stride(), label.stride(0), kept.stride(0)
        sizes = isinstance(left, Tensor), LABELS_AT_ONCE, COLUMNS_AT_ONCE
        _take_out(grid, given, place, n, v, columns.shape[0], *strides, *sizes)


@Kernel
@triton.jit(do_not_specialize_on_alignment=["label", "left"])
def _take_out(
    dz,
    label,
    columns,
    kept,
    left,
    at,
    n,
    v,
    r,
    row_stride,
    column_stride,
    label_stride,
    kept_stride,
    ON_DEVICE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    limit = left
    if ON_DEVICE:
        limit = tl.load(left)
    limit = tl.minimum(limit, n)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    for first in range(0, r, COLUMNS):
        i = (first + tl.arange(0, COLUMNS))[None, :]
        inside = (rows < n) & (i < r)
        column = tl.load(columns + i, mask=i < r, other=-1)
        place = dz + rows.to(tl.int64) * row_stride + column * column_stride
        entry = tl.load(place, mask=inside & (rows < limit) & (column >= 0), other=0.0)
        tl.store(kept + rows * kept_stride + i, entry, mask=inside)
    tl.debug_barrier()  # no thread may write what another is about to read
    row, place, there = _at_labels(dz, label, limit, v, row_stride, column_stride, label_stride, ROWS)
    entry = tl.load(place, mask=there, other=0.0)
    tl.store(kept + row * kept_stride + at, entry, mask=row < n)
    tl.debug_barrier()  # another thread may hold the same row
    tl.store(place, tl.zeros_like(entry), mask=there)


def put_back(dz: Tensor, label: Tensor, kept: Tensor, place: int) -> None:
    """The entry of row i of dz [n, V] at the label [n] becomes what `kept` [n, W] has at `place` of row i."""
    n, v = dz.shape
    if n:
        grid, given = (cdiv(n, LABELS_AT_ONCE), 1, 1), (dz, label, kept)
        strides = *dz.stride(), label.stride(0), kept.stride(0)
        _put_back(grid, given, place, n, v, *strides, LABELS_AT_ONCE, num_warps=1)


@Kernel
@triton.jit(do_not_specialize_on_alignment=["label"])
def _put_back(
    dz, label, kept, at, n, v, row_stride, column_stride, label_stride, kept_stride, ROWS: tl.constexpr
):
    row, place, there = _at_labels(dz, label, n, v, row_stride, column_stride, label_stride, ROWS)
    tl.store(place, tl.load(kept + row * kept_stride + at, mask=row < n), mask=there)


@triton.jit
def _at_labels(dz, label, n, v, row_stride, column_stride, label_stride, ROWS: tl.constexpr):
    """(rows of this program, where their labels' entries of dz are, whether they are there)"""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y = tl.load(label + row * label_stride, mask=row < n, other=-1).to(tl.int64)
    there = (y >= 0) & (y < v) & (row < n)
    return row, dz + row.to(tl.int64) * row_stride + y * column_stride, there


def scale(x: Tensor, factor: Tensor) -> None:
    """Multiply x [N, M] by factor [], unless that is 1; in float32, so neither may be float64."""
    n, m = x.shape
    if x.numel():
        grid = (cdiv(n, ROWS_AT_ONCE), cdiv(m, WIDTH), 1)
        _scale(grid, (x, factor), n, m, *x.stride(), ROWS_AT_ONCE, WIDTH)


@Kernel
@triton.jit
def _scale(x, factor, n, m, row_stride, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        column = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
        first = tl.program_id(0).to(tl.int64) * ROWS
        for i in range(ROWS):
            inside = (column < m) & (first + i < n)
            place = x + (first + i) * row_stride + column * stride
            value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            tl.store(place, (value * by).to(x.dtype.element_ty), mask=inside)


def clear(x: Tensor) -> None:
    """x, which is contiguous, becomes 0."""
    if n := x.numel():
        _clear((cdiv(n, WIDTH), 1, 1), (x,), n, WIDTH)


@Kernel
@triton.jit
def _clear(x, n, WIDTH: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    tl.store(x + i, tl.zeros([WIDTH], x.dtype.element_ty), mask=i < n)


def split(x: Tensor, terms: Tensor) -> None:
    """`terms` [T * n, K] become 16-bit numbers that add up to x [n, K], the largest first.

    What is infinite, or none, is so in the first of them alone.
    """
    n, k = x.shape
    strides = *x.stride(), *terms.stride()
    _split((n, cdiv(k, WIDTH), 1), (x, terms, n), k, *strides, len(terms) // n, WIDTH)


@Kernel
@triton.jit
def _split(
    x,
    terms,
    n,
    k,
    row_stride,
    stride,
    term_row_stride,
    term_stride,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    inside = column < k
    rest = tl.load(x + row * row_stride + column * stride, mask=inside, other=0.0)
    for i in tl.static_range(COUNT):
        term = rest.to(terms.dtype.element_ty)
        tl.store(terms + (i * n + row) * term_row_stride + column * term_stride, term, mask=inside)
        wide = term.to(tl.float32)
        rest = tl.where(wide - wide == 0.0, rest - wide, 0.0)


def fill_order(counts: Tensor, order: Tensor, place: Tensor, count: Tensor) -> None:
    """What `counted.row_order` returns, from counts [N], which is bool."""
    n = counts.shape[0]
    if not n:
        count.zero_()
    else:
        grid, given = (cdiv(n, COUNTED_AT_ONCE), 1, 1), (counts, order, place, count)
        _fill_order(grid, given, n, counts.stride(0), COUNTED_AT_ONCE)


@Kernel
@triton.jit
def _fill_order(counts, order, place, count, n, stride, BLOCK: tl.constexpr):
    # Each program counts all rows, which are a byte each, and finds where its own rows go.
    first = tl.program_id(0) * BLOCK
    total = 0
    before = 0
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        those = tl.sum(tl.load(counts + i * stride, mask=i < n, other=0).to(tl.int32), 0)
        total += those
        before += tl.where(start < first, those, 0)
    row = first + tl.arange(0, BLOCK)
    inside = row < n
    own = tl.load(counts + row * stride, mask=inside, other=0).to(tl.int32)
    counted = before + tl.cumsum(own, 0)
    to = tl.where(own != 0, counted - 1, total + row - counted).to(tl.int64)
    tl.store(place + row, to, mask=inside)
    tl.store(order + to, row.to(tl.int64), mask=inside)
    if first == 0:
        tl.store(count, total)


def fill_left(left: Tensor, count: Tensor | int, step: int, aligned: int) -> None:
    """See `counted.make_left`; what is left becomes a multiple of `aligned`, a power of two."""
    p = left.shape[0]
    sizes = isinstance(count, Tensor), PIECES_AT_ONCE, aligned
    _fill_left((cdiv(p, PIECES_AT_ONCE), 1, 1), (left, count), p, step, *sizes)


@Kernel
@triton.jit(do_not_specialize=["count", "p", "step"])
def _fill_left(left, count, p, step, ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if ON_DEVICE:
        count = tl.load(count)
    rest = count - i * step + (ALIGNED - 1)
    tl.store(left + i, rest & -ALIGNED, mask=i < p)


def fill_numbers(out: Tensor, x: Tensor, order: Tensor | None, counts: Tensor, otherwise: int) -> None:
    """See `counted.make_numbers`."""
    if n := out.shape[0]:
        given = out, x, 0 if order is None else order, counts
        sizes = n, x.stride(0), counts.stride(0), otherwise, order is not None, WIDTH
        _fill_numbers((cdiv(n, WIDTH), 1, 1), given, *sizes)


@Kernel
@triton.jit(do_not_specialize=["n", "otherwise"])
def _fill_numbers(
    out,
    x,
    order,
    counts,
    n,
    stride,
    counts_stride,
    otherwise,
    HAS_ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = i.to(tl.int64)
    if HAS_ORDER:
        source = tl.load(order + i, mask=i < n, other=0)
    counted = tl.load(counts + source * counts_stride, mask=i < n, other=0) != 0
    value = tl.load(x + source * stride, mask=counted & (i < n), other=0)
    kind: tl.constexpr = out.dtype.element_ty
    tl.store(out + i, tl.where(counted, value.to(kind), otherwise.to(kind)), mask=i < n)


def fill_statistics(out: Tensor, made: Tensor, place: Tensor, counts: Tensor) -> None:
    """See `counted.put_back_statistics`."""
    k, n = out.shape
    if n:
        strides = made.stride(0), out.stride(0), counts.stride(0)
        _fill_statistics((cdiv(n, WIDTH), k, 1), (out, made, place, counts), n, *strides, WIDTH)


@Kernel
@triton.jit(do_not_specialize=["n"])
def _fill_statistics(out, made, place, counts, n, row, out_row, counts_stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(1).to(tl.int64)
    counted = tl.load(counts + i * counts_stride, mask=i < n, other=0) != 0
    source = tl.load(place + i, mask=i < n, other=0)
    value = tl.load(made + k * row + source, mask=counted & (i < n), other=1.0)
    tl.store(out + k * out_row + i, value, mask=i < n)


def fill_rows(x: Tensor, rows: Tensor, counted: Tensor, left: Tensor | int, taken: Tensor) -> None:
    """The first `left` rows of `taken` [n, D] become the rows `rows` [n] of x, 0 where not `counted`."""
    on_device = isinstance(left, Tensor)
    n, d = rows.shape[0] if isinstance(left, Tensor) else left, x.shape[1]
    if n and d:
        given = x, rows, counted, left, taken
        _fill_rows((n, cdiv(d, WIDTH), 1), given, d, *x.stride(), on_device, WIDTH)


@Kernel
@triton.jit(do_not_specialize_on_alignment=["rows", "counted", "left"])  # each piece has its own place
def _fill_rows(
    x, rows, counted, left, taken, d, row_stride, stride, ON_DEVICE: tl.constexpr, WIDTH: tl.constexpr
):
    i = tl.program_id(0)
    limit = left
    if ON_DEVICE:
        limit = tl.load(left)
    if i < limit:
        column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        row = tl.load(rows + i)
        wanted = (column < d) & (tl.load(counted + i) != 0)
        value = tl.load(x + row * row_stride + column.to(tl.int64) * stride, mask=wanted, other=0.0)
        tl.store(taken + i.to(tl.int64) * d + column, value.to(taken.dtype.element_ty), mask=column < d)
