"""The matrix products of a head that is computed piece by piece.

    product_into(out [N, M], a [n, K], b [K, M], bias [M] | None, start, accumulate, after)
                            rows start.. of `out` become a b + bias, or gain a b
    once_made(x, after)     a copy of x

A product is what a library makes of it, with float32 sums inside. What is added is order and place.

NOTE Order. Nobody reads what is in `after`. It makes a piece wait until the piece before it is dealt with:
no scheduler, and no fusion of the small kernels of two pieces, can then have two pieces in memory at once.
It also keeps a product that is computed again in the backward from being taken for the one in the forward,
and `once_made` makes the forward wait for the last piece, where the partitioner would move it to the
backward.

NOTE Place. Logits of pieces go to memory that Inductor has allocated, which it knows to be aligned.
Gradients of pieces go to their rows of the whole, or are added there, in place. A sum in float32 of 16-bit
factors rounds nothing from piece to piece.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("inductor_ce::product_into", mutates_args=("out",))
def product_into(
    out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, start: int, accumulate: bool, after: list[Tensor]
) -> None:
    """Rows start..start + n of `out` become a [n, K] times b [K, M] plus `bias` [M], or gain the product.

    `out` has the dtype of the factors, or is float32 where they are 16-bit and there is no bias. What is in
    `after` is not read; it is made before.
    """
    rows = out.narrow(0, start, a.shape[0])
    if bias is not None:
        torch.addmm(bias, a, b, out=rows)
        return
    if out.dtype != a.dtype and a.device.type == "cpu":
        a, b = a.to(out.dtype), b.to(out.dtype)
    wide: dict[str, Any] = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(rows, a, b, out=rows, **wide)
    else:
        torch.mm(a, b, out=rows, **wide)


@product_into.register_fake
def _(
    out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, start: int, accumulate: bool, after: list[Tensor]
) -> None:
    torch._check(a.shape[1] == b.shape[0], lambda: "the factors do not fit")


@torch.library.custom_op("inductor_ce::once_made", mutates_args=())
def once_made(x: Tensor, after: list[Tensor]) -> Tensor:
    """A copy of x. What is in `after` is not read; it is made before."""
    return x.clone()


@once_made.register_fake
def _(x: Tensor, after: list[Tensor]) -> Tensor:
    return torch.empty_like(x)


# The form in which graphs hold them.
PRODUCT_INTO = torch.ops.inductor_ce.product_into.default
ONCE_MADE = torch.ops.inductor_ce.once_made.default
