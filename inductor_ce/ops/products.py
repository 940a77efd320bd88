"""The matrix products of a head that is computed piece by piece.

    logits         (a [n, D], b [D, V], bias | None, after, dtype)      a b + bias [n, V]
    product_into   (out [N, M], a [n, K], b [K, M], start, accumulate)  rows of `out` become, or gain, a b
    product_but    (out [V, M], kept [N, W], dz [n, V], b [n, M], labels, columns, start, accumulate, restore)
                                                                        the same of dz' b, but for labels
    most_frequent  (labels, v, count)                                   the classes that most labels are
    complete       (out [V, M], runs, entries [N, K], rows [N, M], often)
                                                                        what was left out, added at last
    times          (x [N, M], factor [])                                x times factor, in x's dtype
    times_in_place (x, factor)                                          the same; nothing, if factor is 1
    column_sums    (dz [n, V])                                          [V]
    align_rows     (dz [n, V])                                          the same, as `logits` has its rows
    once_made      (x, dtype, after)                                    a copy of x in a dtype

A product is what a library makes of it, with float32 sums inside: see `gemm.py`. What is added is order and
place.

NOTE Rows that count. `left`, `host` and `piece` tell how many rows of a piece are computed: see `counted.py`.
Of others nothing is written, and nothing is summed.

NOTE Order. Nobody reads what is in `after`. It makes a piece wait until the piece before it is dealt with:
no scheduler, and no fusion of the small kernels of two pieces, can then have two pieces in memory at once.
It also keeps a product that is computed again in the backward from being taken for the one in the forward,
and `once_made` makes the forward wait for the last piece, where the partitioner would move it to the
backward.

NOTE Sums in 16 bits. A row of the weight's gradient is about one hidden state where its class is a label,
and orders of magnitude smaller where not. Summed in 16 bits over chunks, all that comes after the label is
rounded to the label's precision, each time anew. So the entries of dz at the labels are left out of the sum
over chunks; their products are added at last, in float32, to rows that are then rounded once. For the classes
that are labels most often that would be worse: the many entries of other rows sum up to what the labels' take
away again. Those few rows are summed in float32 as well. In norm the error is then that of one product over
all rows, whatever the number of chunks; rows without a label are rounded once a chunk. It is no
approximation: whatever the entries are, none is lost.

NOTE Place. Gradients of pieces go to their rows of the whole, or are added there, in place. A sum in float32
of 16-bit factors rounds nothing from piece to piece. What is written in place is read by operators alone,
until the graph is left: torch 2.13 forgets, when it orders loops anew, that a loop must wait for a write.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from . import gemm
from .counted import computed_rows, is_to_load, limit_of_piece, rows_of_piece
from .gemm import ANY_STRIDES, aligned_strides, by_device
from .operators import stats_dtype

if importlib.util.find_spec("triton"):  # which torch's builds for GPUs bring
    from . import counted_kernels


@torch.library.custom_op("inductor_ce::logits", mutates_args=())
def logits(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    after: list[Tensor],
    dtype: torch.dtype | None = None,
    left: Tensor | None = None,
    host: Tensor | None = None,
    piece: int = 0,
) -> Tensor:
    """a [n, D] times b [D, V], plus `bias` [V] or [1], in `dtype`, which is that of the factors or float32
    beside 16-bit ones. What is in `after` is not read; it is made before."""
    z, most = _empty_logits(a, b, dtype), a.shape[0]
    if bias is not None:
        bias = bias.expand(b.shape[1]).contiguous()  # as the kernel, and who takes a part of it, has it
    n = rows_of_piece(left, host, piece, most)
    if n is None and left is not None:
        if is_to_load(left, z, a, b):
            _fill_logits(z, a, b, bias)
        if counted_kernels.product_of_rows(z, a, b, left.select(0, piece), bias):
            return z
    if n is None or n == most:
        _fill_logits(z, a, b, bias)
    elif n:
        _fill_logits(z[:n], a[:n], b, bias)
    return z


def _fill_logits(z: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    if (
        bias is not None
        and z.dtype == a.dtype
        and gemm.is_slow(b.shape[1], a)  # where a library would write the bias, and read it
        and counted_kernels.product_of_rows(z, a, b, len(a), bias)
    ):
        return
    if bias is None or z.dtype != a.dtype:
        if bias is not None:
            z.copy_(bias.expand_as(z))
        gemm.product(z, a, b, bias is not None)
        return
    for part in gemm.fast_parts(b.shape[1], a):
        torch.addmm(bias[part], a, b[:, part], out=z[:, part])


def _empty_logits(a: Tensor, b: Tensor, dtype: torch.dtype | None) -> Tensor:
    """[n, V]. On a GPU each row begins where it can be read and written 16 bytes at a time, and ends there.

    V need not be a multiple of 8 (GPT-2's is 50257), and libraries have slower products for unaligned rows.
    What a row has beyond V is memory of this tensor, which a kernel may read and write.
    """
    row, _ = aligned_strides(b.shape[1], a.device)
    return a.new_empty((a.shape[0], row), dtype=dtype).narrow(1, 0, b.shape[1])


@logits.register_fake
def _(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    after: list[Tensor],
    dtype: torch.dtype | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    return _empty_logits(a, b, dtype)


@torch.library.custom_op("inductor_ce::product_into", mutates_args=("out",), tags=ANY_STRIDES)
def product_into(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    start: int,
    accumulate: bool,
    left: Tensor | None = None,
    host: Tensor | None = None,
    piece: int = 0,
) -> None:
    """Rows start..start + n of `out` become a [n, K] times b [K, M], or gain the product.

    `out` has the dtype of the factors, or is float32 where both or, beside a float32 `a`, b is 16-bit. The
    rows of a piece, where `left` tells them, are those of b.
    """
    _add_terms(out.narrow(0, start, a.shape[0]), a, b, accumulate, left, host, piece)


def _add_terms(
    out: Tensor, a: Tensor, b: Tensor, accumulate: bool, left: Tensor | None, host: Tensor | None, piece: int
) -> None:
    """`out` becomes, or gains, a [M, n] b [n, N], summed over those of the n rows that are computed."""
    most = b.shape[0]
    n = rows_of_piece(left, host, piece, most)
    if n == most:
        gemm.product(out, a, b, accumulate)
        return
    if n is not None:
        if n or not accumulate:
            gemm.product(out, a[:, :n], b[:n], accumulate)
        return
    assert left is not None
    if not accumulate and is_to_load(left, out, a, b):
        gemm.product(out, a, b, False)
    if not counted_kernels.product_over_rows(out, a, b, left.select(0, piece), accumulate):
        a, b = computed_rows(a.t(), left, piece).t(), computed_rows(b, left, piece)
        gemm.product(out, a, b, accumulate)


@product_into.register_fake
def _(out: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> None:
    torch._check(a.shape[1] == b.shape[0], lambda: "the factors do not fit")


@torch.library.custom_op("inductor_ce::product_but", mutates_args=("out", "kept", "dz"), tags=ANY_STRIDES)
def product_but(
    out: Tensor,
    kept: Tensor,
    dz: Tensor,
    b: Tensor,
    labels: list[Tensor],
    columns: Tensor,
    start: int,
    accumulate: bool,
    restore: bool,
    left: Tensor | None = None,
    host: Tensor | None = None,
    piece: int = 0,
) -> None:
    """`out` [V, M] becomes, or gains, dz' [V, n] times b [n, M], but for the entries of dz at the labels.

    Row start + i of `kept` [N, W] becomes, of row i of dz, the entries in the R `columns`, or any number
    where -1 stands for none, and then those at the labels. Where two labels of a row are equal the second
    entry is 0, as it is where a label is none of the V columns. Of a row that is not computed all are 0, or,
    where the host knows that none of the piece is, left as they are. For the product the entries at the
    labels become 0 in dz, and with `restore` what they were thereafter.
    """
    rows, first = kept.narrow(0, start, len(dz)), columns.shape[0]
    take_out, put_back = by_device(dz, _take_out, _put_back)
    limit = limit_of_piece(left, host, piece, len(dz))
    if isinstance(limit, int) and limit == 0 and accumulate:
        return
    for k, label in enumerate(labels):
        take_out(dz, label, columns[:0] if k else columns, rows, first + k, limit)
    _add_terms(out, dz.t(), b, accumulate, left, host, piece)
    for k, label in reversed([*enumerate(labels)]) if restore else ():
        put_back(dz, label, rows, first + k)


def _take_out(
    dz: Tensor, label: Tensor, columns: Tensor, kept: Tensor, place: int, left: Tensor | int
) -> None:
    """See `product_kernels.take_out`."""
    kept[:, : len(columns)], kept[:, place] = 0, 0
    kept[:left, : len(columns)] = dz[:left, columns]
    rows, there = _rows_there(label[:left], dz.shape[1])
    kept[rows, place] = dz[rows, there]
    dz[rows, there] = 0


def _put_back(dz: Tensor, label: Tensor, kept: Tensor, place: int) -> None:
    """The entry of row i of dz [n, V] at the label [n] becomes what `kept` [n, W] has at `place` of row i."""
    rows, there = _rows_there(label, dz.shape[1])
    dz[rows, there] = kept[rows, place]


def _rows_there(label: Tensor, v: int) -> tuple[Tensor, Tensor]:
    """(rows whose label is one of V columns, those labels)"""
    label = label.long()
    (rows,) = torch.where((label >= 0) & (label < v))
    return rows, label[rows]


@product_but.register_fake
def _(
    out: Tensor,
    kept: Tensor,
    dz: Tensor,
    b: Tensor,
    labels: list[Tensor],
    columns: Tensor,
    *_: Any,
    **__: Any,
) -> None:
    torch._check(dz.shape[0] == b.shape[0], lambda: "the factors do not fit")
    torch._check(len(labels) > 0, lambda: "a product without labels is a product")
    torch._check(kept.shape[1] >= len(columns) + len(labels), lambda: "there is no room for the entries")


@torch.library.custom_op("inductor_ce::most_frequent", mutates_args=())
def most_frequent(labels: list[Tensor], v: int, count: int) -> tuple[Tensor, Tensor]:
    """(the R classes of 0..v - 1 that are labels most often, where all labels are)

    The classes are ascending, [R] in int64. Of equally frequent ones the lowest are taken, and -1 stands for
    none where fewer classes are labels. R is `count`, or v if that is less.

    Where labels are, [3, K N] in int32, is told of each in turn, the lowest first, in order of equal ones:
    the label, but v for all that are none of the classes; k N + i, where it is labels[k][i]; and which of the
    R classes it is, if it is the first such label, else -1.
    """
    columns, runs = _empty_runs(labels, v, count)
    (find_runs,) = by_device(columns, _find_runs)
    find_runs(columns, runs, v, *labels)
    return columns, runs


def _find_runs(columns: Tensor, runs: Tensor, v: int, *labels: Tensor) -> None:
    """What `most_frequent` returns."""
    label = torch.cat(labels).long()
    key, place = label.masked_fill((label < 0) | (label >= v), v).sort(stable=True)
    classes, count = key[key < v].unique_consecutive(return_counts=True)
    often = count.sort(descending=True, stable=True).indices[: len(columns)].sort().values
    columns.fill_(-1)[: len(often)] = classes[often]
    column = torch.full_like(key, -1)
    column[(count.cumsum(0) - count)[often]] = torch.arange(len(often), device=key.device)
    runs.copy_(torch.stack((key, place, column)))


@most_frequent.register_fake
def _empty_runs(labels: list[Tensor], v: int, count: int) -> tuple[Tensor, Tensor]:
    n = labels[0].shape[0] * len(labels)
    columns = labels[0].new_empty((min(count, v),), dtype=torch.int64)
    return columns, labels[0].new_empty((3, n), dtype=torch.int32)


@torch.library.custom_op("inductor_ce::complete", mutates_args=("out",))
def complete(out: Tensor, runs: Tensor, entries: Tensor, rows: Tensor, often: Tensor) -> None:
    """Row labels[k][i] of `out` [V, M] gains entries[i, k] (float32) times rows[i] [N, M], for all k and i.

    `runs` is what `most_frequent` returns of the labels. If there are S N rows and entries, the labels are
    those of each N. What a row gains is summed in float32, always in the same order, and the row is rounded
    once. The rows of the most frequent classes become those of `often` [R, M] instead.
    """
    (add_rows,) = by_device(out, _add_rows)
    add_rows(out, runs, entries, rows, often)


def _add_rows(out: Tensor, runs: Tensor, entries: Tensor, rows: Tensor, often: Tensor) -> None:
    """What `complete` does."""
    key, place, column = runs[:, runs[0] < out.shape[0]].long()
    n = max(runs.shape[1] // entries.shape[1], 1)
    k, i = place // n, place[:, None] % n + torch.arange(0, len(rows), n, device=out.device)  # [, S]
    label, which = key.unique_consecutive(return_inverse=True)
    gains = torch.zeros(len(label), out.shape[1], dtype=entries.dtype, device=out.device)
    for rows_of_side in i.T:
        gains.index_add_(0, which, entries[rows_of_side, k, None] * rows[rows_of_side])
    out[label] = (out[label] + gains).to(out.dtype)
    out[key[column >= 0]] = often[column[column >= 0]].to(out.dtype)


@complete.register_fake
def _(out: Tensor, runs: Tensor, entries: Tensor, rows: Tensor, often: Tensor) -> None:
    torch._check(out.shape[1] == rows.shape[1], lambda: "the rows do not fit")
    torch._check(entries.shape[0] == rows.shape[0], lambda: "the entries are not those of the rows")


@torch.library.custom_op("inductor_ce::times", mutates_args=())
def times(x: Tensor, factor: Tensor) -> Tensor:
    """x [N, M] times factor [], rounded to x's dtype once: a product of both would round the factor to it."""
    return (x.to(torch.promote_types(x.dtype, factor.dtype)) * factor).to(x.dtype)


@times.register_fake
def _(x: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("inductor_ce::times_in_place", mutates_args=("x",))
def times_in_place(x: Tensor, factor: Tensor) -> None:
    """Multiply x [N, M] by factor []. Where that is 1, as most upstream gradients are, x is not even read."""
    (scale,) = by_device(x, _scale)
    scale(x, factor)


def _scale(x: Tensor, factor: Tensor) -> None:
    x.copy_(times(x, factor))


@times_in_place.register_fake
def _(x: Tensor, factor: Tensor) -> None:
    torch._check(factor.numel() == 1, lambda: "the factor is no scalar")


@torch.library.custom_op("inductor_ce::column_sums", mutates_args=(), tags=ANY_STRIDES)
def column_sums(dz: Tensor, left: Tensor | None = None, host: Tensor | None = None, piece: int = 0) -> Tensor:
    """The sums over rows of dz [n, V], [V] in float32, or in float64 where dz is.

    On a GPU by a kernel that needs no memory. A sum over rows needs much.
    """
    if dz.device.type == "cuda" and dz.itemsize < 4:
        parts = dz.new_empty((counted_kernels.PARTS, dz.shape[1]), dtype=torch.float32)
        counted_kernels.sums_over_rows(parts, dz, limit_of_piece(left, host, piece, len(dz)))
        return parts.sum(0)
    n = rows_of_piece(left, host, piece, len(dz))
    if n is None and left is not None:
        dz = computed_rows(dz, left, piece)
    return dz[:n].sum(0, dtype=stats_dtype(dz))


@column_sums.register_fake
def _(dz: Tensor, *_: Any, **__: Any) -> Tensor:
    return dz.new_empty((dz.shape[1],), dtype=stats_dtype(dz))


@torch.library.custom_op("inductor_ce::align_rows", mutates_args=())
def align_rows(dz: Tensor) -> Tensor:
    """dz [n, V] with rows as those of `logits`. Inductor lets the loop that makes it write it so."""
    return _with_aligned_rows(dz).copy_(dz)


@align_rows.register_fake
def _with_aligned_rows(dz: Tensor) -> Tensor:
    return dz.new_empty_strided(dz.shape, aligned_strides(dz.shape[1], dz.device))


@torch.library.custom_op("inductor_ce::once_made", mutates_args=())
def once_made(x: Tensor, dtype: torch.dtype, after: list[Tensor]) -> Tensor:
    """A copy of x in a dtype. What is in `after` is not read; it is made before."""
    return x.to(dtype, copy=True)


@once_made.register_fake
def _(x: Tensor, dtype: torch.dtype, after: list[Tensor]) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


# The form in which graphs hold them.
LOGITS = torch.ops.inductor_ce.logits.default
PRODUCT_INTO = torch.ops.inductor_ce.product_into.default
PRODUCT_BUT = torch.ops.inductor_ce.product_but.default
COMPLETE = torch.ops.inductor_ce.complete.default
MOST_FREQUENT = torch.ops.inductor_ce.most_frequent.default
TIMES = torch.ops.inductor_ce.times.default
TIMES_IN_PLACE = torch.ops.inductor_ce.times_in_place.default
COLUMN_SUMS = torch.ops.inductor_ce.column_sums.default
ALIGN_ROWS = torch.ops.inductor_ce.align_rows.default
ONCE_MADE = torch.ops.inductor_ce.once_made.default
