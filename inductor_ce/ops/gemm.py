"""One matrix product by a library, so asked for that it is fast and rounds once.

NOTE Terms. A head in float32 whose hidden states and weight are bfloat16 numbers has products of those: the
logits are the float32 product of 16-bit factors, which is exact but for its sums, as that of float32 factors
is, though a tensor core sums less exactly. The gradient of the logits is float32 in truth. It is written as a
sum of bfloat16 numbers, three of which hold all 24 bits, and each is multiplied by itself. Where products may
round their factors to TF32, two hold more than that. Columns come in blocks: that bounds the memory of the
terms, and the error of long sums.

NOTE Sizes. Libraries have their fast kernels for multiples of eight 16-bit numbers alone, in every dimension
of a product. So what a vocabulary has beyond such a multiple is a product of its own, of a few columns.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..common.compat.graphs import FakeTensor

if importlib.util.find_spec("triton"):  # which torch's builds for GPUs bring
    from . import label_kernels, product_kernels

    KERNELS = product_kernels, label_kernels

# Inductor would copy to the strides that the traced gradient has what is written over aligned logits.
ANY_STRIDES = (torch.Tag.flexible_layout,)

ALIGNED = 8  # elements
TERMS_BYTES = 64 * 2**20  # of the terms of a gradient that are held at once
FEW = 1024  # rows or columns of which a product is fast however unaligned
MOST_COPIED = 2**24  # elements of a product that are held in float32 on their way to 16 bits


def product(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """`out` [M, N] becomes, or gains, a [M, K] b [K, N].

    `out` has the dtype of the factors, or is float32 where both or, beside a float32 `a`, b is 16-bit.
    """
    if out.dtype == a.dtype == b.dtype:
        _product(out, a, b, accumulate)
    elif not has_wide_products(a.device):
        _product(out, a.to(out.dtype), b.to(out.dtype), accumulate)
    elif a.dtype == b.dtype:
        _product(out, a, b, accumulate, out_dtype=out.dtype)
    elif a.stride(0) == 1:
        _product_of_columns(out, a.t(), b, accumulate)
    else:
        _product_of_rows(out, a, b, accumulate)


def has_wide_products(device: torch.device) -> bool:
    """Whether the device's library makes float32 products of 16-bit factors."""
    return device.type == "cuda" and torch.version.hip is None


def aligned_strides(v: int, device: torch.device) -> tuple[int, int]:
    return -(-v // ALIGNED) * ALIGNED if device.type == "cuda" else v, 1


def by_device(like: Tensor, *functions: Callable[..., None]) -> tuple[Callable[..., None], ...]:
    """The functions, or the kernels of the same names where there is a GPU."""
    return _kernels_of(functions) if like.is_cuda else functions  # HIP calls itself cuda


@functools.cache
def _kernels_of(functions: tuple[Callable[..., None], ...]) -> tuple[Callable[..., None], ...]:
    return tuple(_kernel(function.__name__.lstrip("_")) for function in functions)


def _kernel(name: str) -> Callable[..., None]:
    return next(getattr(module, name) for module in KERNELS if hasattr(module, name))


def _product(out: Tensor, a: Tensor, b: Tensor, accumulate: bool, **wide: Any) -> None:
    """`out` [M, N] becomes, or gains, a [M, K] b [K, N], apart for what is over a multiple of ALIGNED."""
    (m, k), n = a.shape, b.shape[1]
    if not (m | n | k) % ALIGNED:
        _by_library(out, a, b, accumulate, **wide)
    elif is_slow(m, a):
        for part in _aligned_and_rest(m):
            _product(out[part], a[part], b, accumulate, **wide)
    elif is_slow(n, a):
        for part in _aligned_and_rest(n):
            _product(out[:, part], a, b[:, part], accumulate, **wide)
    elif is_slow(k, a) and has_wide_products(a.device) and (out.itemsize == 4 or m * n <= MOST_COPIED):
        _product_over_unaligned(out, a, b, accumulate)
    else:
        _by_library(out, a, b, accumulate, **wide)


def _by_library(out: Tensor, a: Tensor, b: Tensor, accumulate: bool, **wide: Any) -> None:
    if isinstance(out, FakeTensor):  # a rehearsal: see `ahead.py`
        return
    if accumulate:
        torch.addmm(out, a, b, out=out, **wide)
    else:
        torch.mm(a, b, out=out, **wide)


def is_slow(size: int, factor: Tensor) -> bool:
    """Whether libraries have slow kernels alone for products of such a size, and it matters."""
    return factor.device.type == "cuda" and factor.itemsize == 2 and size % ALIGNED > 0 and size > FEW


def fast_parts(size: int, factor: Tensor) -> tuple[slice, ...]:
    """Parts of a dimension of such a size that libraries have fast kernels for, or are small."""
    return _aligned_and_rest(size) if is_slow(size, factor) else (slice(0, size),)


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
    (split,) = by_device(x, _split)
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
