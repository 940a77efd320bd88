"""The matrix products of a head that is computed piece by piece, but for those of `label_products`.

    logits         (a [n, D], b [D, V], bias | None, after, dtype)      a b + bias [n, V]
    product_into   (out [N, M], a [n, K], b [K, M], start, accumulate)  rows of `out` become, or gain, a b
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
    from . import counted_kernels, sum_kernels


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
    z = empty_logits(a, b, dtype)
    make_logits(z, a, b, bias, left, host, piece)
    return z


def make_logits(
    z: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    left: Tensor | None,
    host: Tensor | None,
    piece: int,
) -> None:
    """z [n, V] becomes what `logits` returns, for the rows that are computed."""
    most = a.shape[0]
    if bias is not None:
        bias = bias.expand(b.shape[1]).contiguous()  # as the kernel, and who takes a part of it, has it
    n = rows_of_piece(left, host, piece, most)
    if n is None and left is not None:
        if is_to_load(left, z, a, b):
            _fill_logits(z, a, b, bias)
        if counted_kernels.product_of_rows(z, a, b, left.select(0, piece), bias):
            return
    if n is None or n == most:
        _fill_logits(z, a, b, bias)
    elif n:
        _fill_logits(z[:n], a[:n], b, bias)


def _fill_logits(z: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    if bias is None or z.dtype != a.dtype:
        if bias is not None:
            z.copy_(bias.expand_as(z))
        gemm.product(z, a, b, bias is not None)
        return
    if gemm.is_slow(b.shape[1], a) and counted_kernels.product_of_rows(z, a, b, len(a), bias):
        return  # a library would write the bias, and read it
    for part in gemm.fast_parts(b.shape[1], a):
        torch.addmm(bias[part], a, b[:, part], out=z[:, part])


def empty_logits(a: Tensor, b: Tensor, dtype: torch.dtype | None) -> Tensor:
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
    return empty_logits(a, b, dtype)


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
    add_product(out.narrow(0, start, a.shape[0]), a, b, accumulate, left, host, piece)


def add_product(
    out: Tensor, a: Tensor, b: Tensor, accumulate: bool, left: Tensor | None, host: Tensor | None, piece: int
) -> None:
    """`out` [M, N] becomes, or gains, a [M, n] b [n, N], summed over those of n rows that are computed."""
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
        parts = dz.new_empty((sum_kernels.PARTS, dz.shape[1]), dtype=torch.float32)
        sum_kernels.sums_over_rows(parts, dz, limit_of_piece(left, host, piece, len(dz)))
        return parts.sum(0)
    return sums_of_columns(dz, left, host, piece)


def sums_of_columns(dz: Tensor, left: Tensor | None, host: Tensor | None, piece: int) -> Tensor:
    """The same, by the library."""
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
TIMES = torch.ops.inductor_ce.times.default
TIMES_IN_PLACE = torch.ops.inductor_ce.times_in_place.default
COLUMN_SUMS = torch.ops.inductor_ce.column_sums.default
ALIGN_ROWS = torch.ops.inductor_ce.align_rows.default
ONCE_MADE = torch.ops.inductor_ce.once_made.default
