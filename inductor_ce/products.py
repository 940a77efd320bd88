"""The matrix products of a head that is computed piece by piece.

    logits         (a [n, D], b [D, V], bias | None, after)             a b + bias [n, V]
    product_into   (out [N, M], a [n, K], b [K, M], start, accumulate)  rows of `out` become, or gain, a b
    product_but    (out [V, M], often, dz [n, V], b [n, M], labels, columns, accumulate)
                                                                        the same of dz' b, but for labels
    complete       (out [V, M], labels, entries, rows [N, M], columns, often)
                                                                        what was left out, added at last
    most_frequent  (labels, v, count)                                   the classes that most labels are
    column_sums    (dz [n, V])                                          [V]
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

NOTE Place. Gradients of pieces go to their rows of the whole, or are added there, in place. A sum in float32
of 16-bit factors rounds nothing from piece to piece. What is written in place is read by operators alone,
until the graph is left: torch 2.13 forgets, when it orders loops anew, that a loop must wait for a write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import stats_dtype


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


@torch.library.custom_op("inductor_ce::product_but", mutates_args=("out", "often"))
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
    is where a label is none of the columns. For the time of the product they are 0 in dz.
    """
    product_into(often, dz.index_select(1, columns).t(), b, 0, accumulate)
    left_out = [_take_out(dz, label) for label in labels]
    product_into(out, dz.t(), b, 0, accumulate)
    for index, before, _ in reversed(left_out):
        dz.scatter_(1, index, before)
    return torch.stack([entries for *_, entries in left_out])


def _take_out(dz: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Set the entries at the labels to 0. Returns (columns [n, 1], what was there [n, 1], entries [n])."""
    index, valid = _columns(label, dz.shape[1])
    index, valid = index[:, None], valid[:, None]
    before = dz.gather(1, index)
    dz.scatter_(1, index, before.masked_fill(valid, 0))
    return index, before, before.masked_fill(~valid, 0)[:, 0]


def _columns(label: Tensor, v: int) -> tuple[Tensor, Tensor]:
    """The labels, 0 where they are none of V columns, and where they are one."""
    valid = (label >= 0) & (label < v)
    return label.long().masked_fill(~valid, 0), valid


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


SCRATCH = 2**24  # float32 elements of a tensor that `complete` needs for a while; it needs three


@torch.library.custom_op("inductor_ce::complete", mutates_args=("out",))
def complete(
    out: Tensor, labels: list[Tensor], entries: Tensor, rows: Tensor, columns: Tensor, often: Tensor
) -> None:
    """Row labels[k][i] of `out` [V, M] gains entries[k, i] (float32) times rows[i] [N, M], for all k and i.

    What a row gains is summed in float32, always in the same order, and the row is rounded once. Labels that
    are none of the V rows are left out. Then the rows `columns` become those of `often`.
    """
    index, valid = _columns(torch.cat(labels), out.shape[0])
    factor = entries.flatten().masked_fill(~valid, 0)[:, None]
    # One of the places of each label stands for it, whichever: the sums are no larger than what is summed.
    places = torch.arange(len(index), device=index.device)
    place = index.new_empty(out.shape[0]).scatter_(0, index, places).index_select(0, index)
    width = max(SCRATCH // max(len(index), 1), 1)
    for part, target in zip(rows.split(width, 1), out.split(width, 1), strict=True):
        gains = part.float().repeat(len(labels), 1).mul_(factor)
        sums = torch.ops.aten.embedding_dense_backward(gains, place, len(index), -1, False)
        del gains
        sums = sums.index_select(0, place).add_(target.index_select(0, index))
        target.index_copy_(0, index, sums.to(out.dtype))
    out.index_copy_(0, columns, often.to(out.dtype))


@complete.register_fake
def _(
    out: Tensor, labels: list[Tensor], entries: Tensor, rows: Tensor, columns: Tensor, often: Tensor
) -> None:
    torch._check(out.shape[1] == rows.shape[1], lambda: "the rows do not fit")


@torch.library.custom_op("inductor_ce::most_frequent", mutates_args=())
def most_frequent(labels: list[Tensor], v: int, count: int) -> Tensor:
    """The classes of 0..v - 1 that are labels most often, `count` of them, the lowest of equals."""
    index, valid = _columns(torch.cat(labels), v)
    counts = torch.zeros(v, dtype=torch.int32, device=index.device).scatter_add_(0, index, valid.int())
    return counts.sort(descending=True, stable=True).indices[:count].clone()


@most_frequent.register_fake
def _(labels: list[Tensor], v: int, count: int) -> Tensor:
    return labels[0].new_empty((min(count, v),), dtype=torch.int64)


@torch.library.custom_op("inductor_ce::column_sums", mutates_args=())
def column_sums(dz: Tensor) -> Tensor:
    """The sums over rows of dz [n, V], [V] in float32, or in float64 where dz is."""
    return dz.sum(0, dtype=stats_dtype(dz))


@column_sums.register_fake
def _(dz: Tensor) -> Tensor:
    return dz.new_empty((dz.shape[1],), dtype=stats_dtype(dz))


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
COLUMN_SUMS = torch.ops.inductor_ce.column_sums.default
ONCE_MADE = torch.ops.inductor_ce.once_made.default
