"""The gradient of a weight over chunks without its entries at labels, which are added at last.

    product_but    (out [V, M], kept [N, W], dz [n, V], b [n, M], labels, columns, start, accumulate, restore)
                                         `out` becomes, or gains, dz' b, but for the entries at labels
    most_frequent  (labels, v, count)    the classes that most labels are
    complete       (out [V, M], runs, entries [N, K], rows [N, M], often)
                                         what was left out, added to `out`

NOTE Sums in 16 bits. A row of the weight's gradient is about one hidden state where its class is a label,
and orders of magnitude smaller where not. Summed in 16 bits over chunks, all that comes after the label is
rounded to the label's precision, each time anew. So the entries of dz at the labels are left out of the sum
over chunks; their products are added at last, in float32, to rows that are then rounded once. For the classes
that are labels most often that would be worse: the many entries of other rows sum up to what the labels' take
away again. Those few rows are summed in float32 as well. In norm the error is then that of one product over
all rows, whatever the number of chunks; rows without a label are rounded once a chunk. It is no
approximation: whatever the entries are, none is lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .counted import limit_of_piece
from .gemm import ANY_STRIDES, by_device
from .products import add_product


def add_product_but(
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
    add_product(out, dz.t(), b, accumulate, left, host, piece)
    for k, label in reversed([*enumerate(labels)]) if restore else ():
        put_back(dz, label, rows, first + k)


product_but = torch.library.custom_op(
    "inductor_ce::product_but", add_product_but, mutates_args=("out", "kept", "dz"), tags=ANY_STRIDES
)


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
    make_runs(columns, runs, v, labels)
    return columns, runs


def make_runs(
    columns: Tensor, runs: Tensor, v: int, labels: list[Tensor], room: Tensor | None = None
) -> None:
    """They become what `most_frequent` returns; see `label_kernels.find_runs` for `room`."""
    (find_runs,) = by_device(columns, _find_runs)
    find_runs(columns, runs, v, room, *labels)


def _find_runs(columns: Tensor, runs: Tensor, v: int, room: Tensor | None, *labels: Tensor) -> None:
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


# The form in which graphs hold them.
PRODUCT_BUT = torch.ops.inductor_ce.product_but.default
COMPLETE = torch.ops.inductor_ce.complete.default
MOST_FREQUENT = torch.ops.inductor_ce.most_frequent.default
