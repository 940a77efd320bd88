"""The matrix products of a head that is computed piece by piece.

    logits      (a [n, D], b [D, V], bias | None, after)             a b + bias [n, V]
    product_into(out [N, M], a [n, K], b [K, M], start, accumulate)  rows of `out` become, or gain, a b
    once_made   (x, dtype, after)                                    a copy of x in a dtype

A product is what a library makes of it, with float32 sums inside. What is added is order and place.

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

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("inductor_ce::logits", mutates_args=())
def logits(a: Tensor, b: Tensor, bias: Tensor | None, after: list[Tensor]) -> Tensor:
    """a [n, D] times b [D, V], plus `bias`. What is in `after` is not read; it is made before."""
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


@logits.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None, after: list[Tensor]) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]))


@torch.library.custom_op("inductor_ce::product_into", mutates_args=("out",))
def product_into(out: Tensor, a: Tensor, b: Tensor, start: int, accumulate: bool) -> None:
    """Rows start..start + n of `out` become a [n, K] times b [K, M], or gain the product.

    `out` has the dtype of the factors, or is float32 where they are 16-bit.
    """
    rows = out.narrow(0, start, a.shape[0])
    if out.dtype != a.dtype and a.device.type == "cpu":
        a, b = a.to(out.dtype), b.to(out.dtype)
    wide: dict[str, Any] = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(rows, a, b, out=rows, **wide)
    else:
        torch.mm(a, b, out=rows, **wide)


@product_into.register_fake
def _(out: Tensor, a: Tensor, b: Tensor, start: int, accumulate: bool) -> None:
    torch._check(a.shape[1] == b.shape[0], lambda: "the factors do not fit")


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
ONCE_MADE = torch.ops.inductor_ce.once_made.default
