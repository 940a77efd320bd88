"""The matrix products of a head that is computed piece by piece.

    logits         (a [n, D], b [D, V], bias | None, after, dtype)      a b + bias [n, V]
    product_into   (out [N, M], a [n, K], b [K, M], start, accumulate)  rows of `out` become, or gain, a b
    product_but    (out [V, M], often, dz [n, V], b [n, M], labels, columns, accumulate)
                                                                        the same of dz' b, but for labels
    complete       (out [V, M], labels, entries, rows [N, M], columns, often)
                                                                        what was left out, added at last
    most_frequent  (labels, v, count)                                   the classes that most labels are
    times          (x [N, M], factor [])                                x times factor, in x's dtype
    times_in_place (x, factor)                                          the same; nothing, if factor is 1
    column_sums    (dz [n, V])                                          [V]
    align_rows     (dz [n, V])                                          the same, as `logits` has its rows
    once_made      (x, dtype, after)                                    a copy of x in a dtype

A product is what a library makes of it, with float32 sums inside. What is added is order and place.

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

NOTE Terms. A head in float32 whose hidden states and weight are bfloat16 numbers has products of those: the
logits are the float32 product of 16-bit factors, which is exact but for its sums, as that of float32 factors
is. The gradient of the logits is float32 in truth. It is written as a sum of bfloat16 numbers, three of which
hold all 24 bits, and each is multiplied by itself. Where products may round their factors to TF32, two hold
more than that.

NOTE Sizes. Libraries have their fast kernels for multiples of eight 16-bit numbers alone, in every dimension
of a product. So what a vocabulary has beyond such a multiple is a product of its own, of a few columns.

NOTE Place. Gradients of pieces go to their rows of the whole, or are added there, in place. A sum in float32
of 16-bit factors rounds nothing from piece to piece. What is written in place is read by operators alone,
until the graph is left: torch 2.13 forgets, when it orders loops anew, that a loop must wait for a write.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .operators import stats_dtype

if importlib.util.find_spec("triton"):  # which torch's builds for GPUs bring
    from . import product_kernels


ALIGNED = 8  # elements
TERMS_BYTES = 64 * 2**20  # of the terms of a gradient that are held at once
FEW = 1024  # rows or columns of which a product is fast however unaligned
MOST_COPIED = 2**24  # elements of a product that are held in float32 on their way to 16 bits
# Inductor would copy to the strides that the traced gradient has what is written over aligned logits.
ANY_STRIDES = (torch.Tag.flexible_layout,)


@torch.library.custom_op("inductor_ce::logits", mutates_args=())
def logits(
    a: Tensor, b: Tensor, bias: Tensor | None, after: list[Tensor], dtype: torch.dtype | None = None
) -> Tensor:
    """a [n, D] times b [D, V], plus `bias`, in `dtype`, which is that of the factors or float32 beside 16-bit
    ones. What is in `after` is not read; it is made before."""
    z = _empty_logits(a, b, dtype)
    if bias is not None and z.dtype == a.dtype and not _is_slow(b.shape[1], a):
        return torch.addmm(bias, a, b, out=z)
    if bias is not None:
        z.copy_(bias.expand_as(z))
    product_into(z, a, b, 0, bias is not None)
    return z


def _empty_logits(a: Tensor, b: Tensor, dtype: torch.dtype | None) -> Tensor:
    """[n, V]. On a GPU each row begins where it can be read and written 16 bytes at a time.

    V need not be a multiple of 8 (GPT-2's is 50257), and libraries have slower products for unaligned rows.
    """
    return a.new_empty_strided((a.shape[0], b.shape[1]), aligned_strides(b.shape[1], a.device), dtype=dtype)


def aligned_strides(v: int, device: torch.device) -> tuple[int, int]:
    return -(-v // ALIGNED) * ALIGNED if device.type == "cuda" else v, 1


@logits.register_fake
def _(
    a: Tensor, b: Tensor, bias: Tensor | None, after: list[Tensor], dtype: torch.dtype | None = None
) -> Tensor:
    return _empty_logits(a, b, dtype)


@torch.library.custom_op("inductor_ce::product_into", mutates_args=("out",), tags=ANY_STRIDES)
def product_into(out: Tensor, a: Tensor, b: Tensor, start: int, accumulate: bool) -> None:
    """Rows start..start + n of `out` become a [n, K] times b [K, M], or gain the product.

    `out` has the dtype of the factors, or is float32 where both or, beside a float32 `a`, b is 16-bit.
    """
    rows = out.narrow(0, start, a.shape[0])
    if out.dtype == a.dtype == b.dtype:
        _product(rows, a, b, accumulate)
    elif not has_wide_products(a.device):
        _product(rows, a.to(out.dtype), b.to(out.dtype), accumulate)
    elif a.dtype == b.dtype:
        _product(rows, a, b, accumulate, out_dtype=out.dtype)
    elif a.stride(0) == 1:
        _product_of_columns(rows, a.t(), b, accumulate)
    else:
        _product_of_rows(rows, a, b, accumulate)


def _product(out: Tensor, a: Tensor, b: Tensor, accumulate: bool, **wide: Any) -> None:
    """`out` [M, N] becomes, or gains, a [M, K] b [K, N], apart for what is over a multiple of ALIGNED."""
    (m, k), n = a.shape, b.shape[1]
    if _is_slow(m, a):
        for part in _aligned_and_rest(m):
            _product(out[part], a[part], b, accumulate, **wide)
    elif _is_slow(n, a):
        for part in _aligned_and_rest(n):
            _product(out[:, part], a, b[:, part], accumulate, **wide)
    elif _is_slow(k, a) and has_wide_products(a.device) and (out.itemsize == 4 or m * n <= MOST_COPIED):
        _product_over_unaligned(out, a, b, accumulate)
    else:
        _by_library(out, a, b, accumulate, **wide)


def _by_library(out: Tensor, a: Tensor, b: Tensor, accumulate: bool, **wide: Any) -> None:
    if accumulate:
        torch.addmm(out, a, b, out=out, **wide)
    else:
        torch.mm(a, b, out=out, **wide)


def _is_slow(size: int, factor: Tensor) -> bool:
    """Whether libraries have slow kernels alone for products of such a size, and it matters."""
    return factor.device.type == "cuda" and factor.itemsize == 2 and size % ALIGNED > 0 and size > FEW


def _aligned_and_rest(size: int) -> tuple[slice, slice]:
    aligned = size - size % ALIGNED
    return slice(0, aligned), slice(aligned, size)


def _product_over_unaligned(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """The same, where K is unaligned. It is rounded once."""
    total = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    if accumulate and total is not out:
        total.copy_(out)
    for part in _aligned_and_rest(a.shape[1]):
        _product(total, a[:, part], b[part], accumulate or part.start > 0, out_dtype=torch.float32)
    if total is not out:
        out.copy_(total)


def has_wide_products(device: torch.device) -> bool:
    """Whether the device's library makes float32 products of 16-bit factors."""
    return device.type == "cuda" and torch.version.hip is None


def _product_of_columns(out: Tensor, x: Tensor, b: Tensor, accumulate: bool) -> None:
    """`out` [K, M] becomes, or gains, x' b of x [n, K] in float32 and b [n, M] in 16 bits."""
    if not accumulate and not len(x):
        out.zero_()
    count = _how_many_terms()
    repeated = b.repeat(count, 1)
    for start, terms in _terms_of_blocks(x, count, b.dtype):
        _product(out.narrow(0, start, terms.shape[1]), terms.t(), repeated, accumulate, out_dtype=out.dtype)


def _product_of_rows(out: Tensor, x: Tensor, b: Tensor, accumulate: bool) -> None:
    """`out` [n, M] becomes, or gains, x b of x [n, K] in float32 and b [K, M] in 16 bits."""
    count = _how_many_terms()
    products = x.new_zeros(count * x.shape[0], b.shape[1])
    for start, terms in _terms_of_blocks(x, count, b.dtype):
        _product(products, terms, b.narrow(0, start, terms.shape[1]), True, out_dtype=out.dtype)
    total = products.view(count, *out.shape).sum(0)
    if accumulate:
        out.add_(total)
    else:
        out.copy_(total)


def _how_many_terms() -> int:
    """As many as hold what a float32 product on a GPU reads of its factors."""
    return 2 if torch.backends.cuda.matmul.fp32_precision == "tf32" else 3


def _terms_of_blocks(x: Tensor, count: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first column, terms [count * n, columns]) of some columns of x [n, K] after others."""
    n, k = x.shape
    if not x.numel():
        return
    most = max(TERMS_BYTES // (count * n * dtype.itemsize) // ALIGNED, 1) * ALIGNED
    most = min(math.ceil(k / math.ceil(k / most) / ALIGNED) * ALIGNED, k)
    (split,) = _by_device(x, _split)
    for start in range(0, k, most):
        block = x.narrow(1, start, min(most, k - start))
        size = count * n, block.shape[1]
        terms = x.new_empty_strided(size, aligned_strides(size[1], x.device), dtype=dtype)
        split(block, terms)
        yield start, terms


def _split(x: Tensor, terms: Tensor) -> None:
    """`terms` [T * n, K] become 16-bit numbers that add up to x [n, K], the largest first.

    What is infinite, or none, is so in the first of them alone.
    """
    rest = x
    for term in terms.unflatten(0, (-1, len(x))):
        term.copy_(rest)
        wide = term.to(x.dtype)
        rest = torch.where(wide.isfinite(), rest - wide, 0.0)


@product_into.register_fake
def _(out: Tensor, a: Tensor, b: Tensor, start: int, accumulate: bool) -> None:
    torch._check(a.shape[1] == b.shape[0], lambda: "the factors do not fit")


@torch.library.custom_op("inductor_ce::product_but", mutates_args=("out", "often", "dz"), tags=ANY_STRIDES)
def product_but(
    out: Tensor,
    often: Tensor,
    dz: Tensor,
    b: Tensor,
    labels: list[Tensor],
    columns: Tensor,
    accumulate: bool,
) -> Tensor:
    """`out` [V, M] becomes, or gains, dz' [V, n] times b [n, M], but for the entries of dz at the labels.

    `often` [R, M], in float32, becomes, or gains, the rows `columns` of the product, with all entries.
    Returns the entries at the labels, [labels, n]; where two labels of a row are equal the second is 0, as it
    is where a label is none of the columns. For the time of the product they are 0 in dz, which is therefore
    written, though who reads it afterwards finds it as it was.
    """
    take_columns, take_out, put_back = _by_device(dz, _take_columns, _take_out, _put_back)
    taken = dz.new_empty((dz.shape[0], len(columns)))
    take_columns(dz, columns, taken)
    product_into(often, taken.t(), b, 0, accumulate)
    entries = dz.new_empty((len(labels), dz.shape[0]))
    for label, of_label in zip(labels, entries, strict=True):
        take_out(dz, label, of_label)
    product_into(out, dz.t(), b, 0, accumulate)
    for label, of_label in reversed([*zip(labels, entries, strict=True)]):
        put_back(dz, label, of_label)
    return entries


def _by_device(like: Tensor, *functions: Callable[..., None]) -> tuple[Callable[..., None], ...]:
    """The functions, or the kernels of the same names where there is a GPU."""
    if like.device.type != "cuda":  # HIP calls itself cuda
        return functions
    return tuple(getattr(product_kernels, function.__name__.lstrip("_")) for function in functions)


def _take_columns(dz: Tensor, columns: Tensor, taken: Tensor) -> None:
    """`taken` [n, R] become the columns [R]."""
    torch.index_select(dz, 1, columns, out=taken)


def _take_out(dz: Tensor, label: Tensor, entries: Tensor) -> None:
    """`entries` [n] become those at the labels, which become 0."""
    rows, there = _rows_there(label, dz.shape[1])
    entries.zero_()[rows] = dz[rows, there]
    dz[rows, there] = 0


def _put_back(dz: Tensor, label: Tensor, entries: Tensor) -> None:
    """The entries at the labels become `entries`."""
    rows, there = _rows_there(label, dz.shape[1])
    dz[rows, there] = entries[rows]


def _rows_there(label: Tensor, v: int) -> tuple[Tensor, Tensor]:
    """(rows whose label is one of V columns, those labels)"""
    label = label.long()
    (rows,) = torch.where((label >= 0) & (label < v))
    return rows, label[rows]


@product_but.register_fake
def _(
    out: Tensor,
    often: Tensor,
    dz: Tensor,
    b: Tensor,
    labels: list[Tensor],
    columns: Tensor,
    accumulate: bool,
) -> Tensor:
    torch._check(dz.shape[0] == b.shape[0], lambda: "the factors do not fit")
    return dz.new_empty((len(labels), dz.shape[0]))


@torch.library.custom_op("inductor_ce::complete", mutates_args=("out",))
def complete(
    out: Tensor, labels: list[Tensor], entries: Tensor, rows: Tensor, columns: Tensor, often: Tensor
) -> None:
    """Row labels[k][i] of `out` [V, M] gains entries[k, i] (float32) times rows[i] [N, M], for all k and i.

    What a row gains is summed in float32, always in the same order, and the row is rounded once. Labels that
    are none of the V rows are left out. The rows `columns` become those of `often` instead.
    """
    v = out.shape[0]
    label = torch.cat([*labels, columns.new_full((1,), v)])
    is_apart = torch.zeros(v, dtype=torch.bool, device=out.device).index_fill_(0, columns, True)
    there = (label >= 0) & (label < v)
    there &= ~is_apart[label.masked_fill(~there, 0)]
    key, order = label.masked_fill(~there, v).int().sort(stable=True)
    (add_rows,) = _by_device(out, _add_rows)
    add_rows(out, key, order[:-1], entries.flatten(), rows)
    out.index_copy_(0, columns, often.to(out.dtype))


def _add_rows(out: Tensor, key: Tensor, order: Tensor, factor: Tensor, rows: Tensor) -> None:
    """Row key[i] of `out` gains factor[order[i]] times rows[order[i] % N], for all i but the last."""
    count = int((key < out.shape[0]).sum())
    label, place = key[:count].unique_consecutive(return_inverse=True)
    order = order[:count]
    gains = torch.zeros(len(label), out.shape[1], dtype=factor.dtype, device=out.device)
    gains.index_add_(0, place, factor[order, None] * rows[order % max(len(rows), 1)])
    out[label.long()] = (out[label.long()] + gains).to(out.dtype)


@complete.register_fake
def _(
    out: Tensor, labels: list[Tensor], entries: Tensor, rows: Tensor, columns: Tensor, often: Tensor
) -> None:
    torch._check(out.shape[1] == rows.shape[1], lambda: "the rows do not fit")


@torch.library.custom_op("inductor_ce::most_frequent", mutates_args=())
def most_frequent(labels: list[Tensor], v: int, count: int) -> Tensor:
    """The classes of 0..v - 1 that are labels most often, `count` of them, the lowest of equals."""
    label = torch.cat(labels).long()
    there = (label >= 0) & (label < v)
    counts = torch.zeros(v, dtype=torch.int32, device=label.device)
    counts.scatter_add_(0, label.masked_fill(~there, 0), there.int())
    return counts.sort(descending=True, stable=True).indices[:count].clone()


@most_frequent.register_fake
def _(labels: list[Tensor], v: int, count: int) -> Tensor:
    return labels[0].new_empty((min(count, v),), dtype=torch.int64)


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
    (scale,) = _by_device(x, _scale)
    scale(x, factor)


def _scale(x: Tensor, factor: Tensor) -> None:
    x.copy_(times(x, factor))


@times_in_place.register_fake
def _(x: Tensor, factor: Tensor) -> None:
    torch._check(factor.numel() == 1, lambda: "the factor is no scalar")


@torch.library.custom_op("inductor_ce::column_sums", mutates_args=(), tags=ANY_STRIDES)
def column_sums(dz: Tensor) -> Tensor:
    """The sums over rows of dz [n, V], [V] in float32, or in float64 where dz is.

    On a GPU as a product, which is as exact and needs no memory. A sum over rows needs much.
    """
    if dz.itemsize < 4 and has_wide_products(dz.device):
        ones = dz.new_ones((1, dz.shape[0]))
        return torch.mm(ones, dz, out_dtype=torch.float32)[0]
    return dz.sum(0, dtype=stats_dtype(dz))


@column_sums.register_fake
def _(dz: Tensor) -> Tensor:
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
