"""Rows that count, before those that do not.

A loss reads the statistics of some rows alone, where labels are ignored or a mask is given. Those rows are
taken first, by an order that the device makes, and pieces of a head are filled with them one after another.
How many of them a piece has is known on the device. There the kernels of rows read it, while products, which
a library makes, need it on the host: it is copied there as soon as it is known, which is before the work that
leads to the head has been done, and read when the head is launched.

    row_order   (counts [N])     order [N], place [N], count [1]
    host_copy   (left [P])       the same on the host, on its way
    recorded    (left [P], n, head)   the same, or all rows, as a CUDA graph is to have it
    take_rows   (x [N, D], rows [n], counted [n], after)      [n, D], 0 in rows that are not counted
    product_to_rows (out [N, M], a [n, K], b [K, M], start)       rows start..start + n of `out` become a b
    frequent_rows   (kept [N, R], rows [N, M], order, counted)   kept' [R, N] times rows [N, M] in that order

Operators are given `left`, which holds for each of P pieces the number of rows to be computed from the
piece's first on, all that follow included; `host`, its copy; and the number of the piece. There is no `host`
where the device alone may look, and no `left` where all rows count. A piece computes ALIGNED rows or a
multiple, as libraries are slow for other products; what is added has label -1, hidden states of 0, and a
gradient of 0. Rows beyond are not written.

A CUDA graph is recorded once, for whatever comes: with products that read a number on the device, or with the
library's, which are faster and compute all rows. The call before, which is not recorded, decides.
"""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import torch
from torch import Tensor

from . import gemm
from .gemm import ANY_STRIDES, by_device

if importlib.util.find_spec("triton"):  # which torch's builds for GPUs bring
    from . import counted_kernels, sum_kernels

ALIGNED = 64  # rows
TAKEN_BYTES = 16 * 2**20  # of the rows that are taken at once where all are read
PENDING = -(2**31)
ALL = 2**30  # more than all rows
NEARLY_ALL = 31 / 32  # of the rows: what is left out does not pay for the slower products
MOST_SEEN = 1024


@torch.library.custom_op("inductor_ce::row_order", mutates_args=())
def row_order(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How to bring the rows that count before the others, each kind in its own order.

    Args:
        counts: bool [N].

    Returns:
        order: int64 [N], the rows in the new order.
        place: int64 [N], where each row is in it.
        count: int32 [1], how many rows count.
    """
    order, place = (torch.empty_like(counts, dtype=torch.int64) for _ in range(2))
    count = counts.new_empty(1, dtype=torch.int32)
    make_order(counts, order, place, count)
    return order, place, count


def make_order(counts: Tensor, order: Tensor, place: Tensor, count: Tensor) -> None:
    """They become what `row_order` returns."""
    (fill,) = by_device(counts, _fill_order)
    fill(counts, order, place, count)


def _fill_order(counts: Tensor, order: Tensor, place: Tensor, count: Tensor) -> None:
    order.copy_(torch.argsort(~counts, stable=True))
    place.scatter_(0, order, torch.arange(len(order), device=order.device))
    count.copy_(counts.sum().reshape(1))


@row_order.register_fake
def _(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.empty_like(counts, dtype=torch.int64)
    return index, torch.empty_like(index), counts.new_empty(1, dtype=torch.int32)


def make_left(left: Tensor, count: Tensor | int, step: int) -> None:
    """`left` [P] becomes what operators are given of so many rows, [1] or a number, in pieces of `step`."""
    (fill,) = by_device(left, _fill_left)
    fill(left, count, step, ALIGNED)


def _fill_left(left: Tensor, count: Tensor | int, step: int, aligned: int) -> None:
    rest = count - step * torch.arange(len(left), dtype=torch.int32, device=left.device)
    left.copy_((rest + (aligned - 1)) & -aligned)


def make_numbers(out: Tensor, x: Tensor, order: Tensor | None, counts: Tensor, otherwise: int) -> None:
    """`out` [N] becomes numbers x [N] in an order, or theirs; another one for rows that do not count."""
    (fill,) = by_device(out, _fill_numbers)
    fill(out, x, order, counts, otherwise)


def _fill_numbers(out: Tensor, x: Tensor, order: Tensor | None, counts: Tensor, otherwise: int) -> None:
    if order is not None:
        x, counts = x[order], counts[order]
    out.copy_(x).masked_fill_(~counts, otherwise)


def put_back_statistics(out: Tensor, made: Tensor, place: Tensor, counts: Tensor) -> None:
    """`out` [K, N] becomes `made` [K, N] in the order of the rows, 1 in those that do not count."""
    (fill,) = by_device(out, _fill_statistics)
    fill(out, made, place, counts)


def _fill_statistics(out: Tensor, made: Tensor, place: Tensor, counts: Tensor) -> None:
    out.copy_(torch.where(counts, made[:, place], 1.0))


@torch.library.custom_op("inductor_ce::host_copy", mutates_args=())
def host_copy(left: Tensor) -> Tensor:
    """`left` in the host's memory, PENDING where it has not come yet: nobody has waited for it."""
    host = torch.full(left.shape, PENDING, dtype=left.dtype, device="cpu", pin_memory=True)
    return host.copy_(left, non_blocking=True)


@host_copy.register_fake
def _(left: Tensor) -> Tensor:
    return left.new_empty(left.shape, device="cpu")


@torch.library.custom_op("inductor_ce::recorded", mutates_args=())
def recorded(left: Tensor, n: int, head: int) -> Tensor:
    """`left` as a CUDA graph is to have it: that, or ALL where nearly all rows counted in the call before.

    Whoever records a graph has called the function before, and has waited for the GPU. That call's numbers
    are copied to the host, and the recording looks at them. What is computed is right for any numbers.

    Args:
        left: int32 [P].
        n: how many rows there are.
        head: the number of the head in its graph. With n and P it tells heads apart.
    """
    which = (head, n, len(left), left.device)
    made = left.clone()
    if not is_being_recorded(left):
        if len(_seen) < MOST_SEEN or which in _seen:
            _seen[which] = host_copy(left)
        made._role = BEFORE_A_RECORDING  # type: ignore[attr-defined]
    elif which in _seen and _seen[which].tolist()[0] >= NEARLY_ALL * n:
        made.fill_(ALL)._role = OF_ALL_ROWS  # type: ignore[attr-defined]
    return made


# What `recorded` saw last of a head. No result depends on it.
_seen: dict[tuple[Any, ...], Tensor] = {}

# What operators are told by `left` itself: to compute all rows, or to load what a recording may need for it.
OF_ALL_ROWS, BEFORE_A_RECORDING = "of all rows", "before a recording"


def is_being_recorded(x: Tensor) -> bool:
    """Whether what reads x becomes part of a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@recorded.register_fake
def _(left: Tensor, n: int, head: int) -> Tensor:
    return torch.empty_like(left)


def role_of(left: Tensor | None) -> str | None:
    return None if left is None else left.__dict__.get("_role")


def rows_of_piece(left: Tensor | None, host: Tensor | None, piece: int, most: int) -> int | None:
    """How many of its `most` rows a piece computes; None where the device alone may look."""
    if left is None or role_of(left) == OF_ALL_ROWS:
        return most
    if left.is_cpu:
        n = int(left.select(0, piece))
    elif host is None or is_being_recorded(left):
        return None
    else:
        n = _arrived(host, piece)
    return min(max(n, 0), most)


def limit_of_piece(left: Tensor | None, host: Tensor | None, piece: int, most: int) -> Tensor | int:
    """The same for kernels that may read it on the device: a number there, [], or here."""
    n = rows_of_piece(left, host, piece, most)
    if left is not None and (n is None or role_of(left) == OF_ALL_ROWS):
        return left.select(0, piece)
    return n  # type: ignore[return-value]


def is_to_load(left: Tensor | None, out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether a library's product of all rows is made as well, before a recording that may have it instead.

    A library may not begin, nor load a kernel, while a graph is recorded.
    """
    if role_of(left) != BEFORE_A_RECORDING:
        return False
    which = (out.shape, out.dtype, out.device, *(x.stride() for x in (out, a, b)))
    if which in _loaded:
        return False
    if len(_loaded) < MOST_SEEN:
        _loaded.add(which)
    return True


_loaded: set[tuple[Any, ...]] = set()


def computed_rows(x: Tensor, left: Tensor, piece: int) -> Tensor:
    """x [n, M] with 0 in rows that are not computed, for operators that do not look at `left`."""
    return torch.where((torch.arange(len(x), device=x.device) < left.select(0, piece))[:, None], x, 0.0)


def _arrived(host: Tensor, piece: int) -> int:
    """An element of a `host_copy`, when all have come: they are read once, and kept with it."""
    found: list[int] = getattr(host, "_arrived", [PENDING])
    while PENDING in found:
        is_over = torch.cuda.current_stream().query()
        found = host.tolist()
        if is_over and PENDING in found:
            raise RuntimeError("the number of rows that count has not come to the host")
        time.sleep(0)
    host._arrived = found  # type: ignore[attr-defined]
    return found[piece]


@torch.library.custom_op("inductor_ce::take_rows", mutates_args=())
def take_rows(
    x: Tensor,
    rows: Tensor,
    counted: Tensor,
    after: list[Tensor],
    left: Tensor | None = None,
    host: Tensor | None = None,
    piece: int = 0,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The rows `rows` [n] of x [N, D], 0 where `counted` is False, in `dtype`, or that of x.

    What is in `after` is made before.
    """
    taken = _empty_rows(x, rows, dtype=dtype)
    make_rows(taken, x, rows, counted, left, host, piece)
    return taken


def make_rows(
    taken: Tensor,
    x: Tensor,
    rows: Tensor,
    counted: Tensor,
    left: Tensor | None,
    host: Tensor | None,
    piece: int,
) -> None:
    """`taken` [n, D] becomes what `take_rows` returns, in the rows that are computed."""
    (fill,) = by_device(x, _fill_rows)
    fill(x, rows, counted, limit_of_piece(left, host, piece, rows.shape[0]), taken)


def _fill_rows(x: Tensor, rows: Tensor, counted: Tensor, left: int, taken: Tensor) -> None:
    """The first `left` rows of `taken` [n, D] become the rows `rows` [n] of x, 0 where not `counted`."""
    taken[:left] = torch.where(counted[:left, None], x[rows[:left]], 0.0).to(taken.dtype)


@take_rows.register_fake
def _empty_rows(x: Tensor, rows: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return x.new_empty((rows.shape[0], x.shape[1]), dtype=dtype)


@torch.library.custom_op("inductor_ce::product_to_rows", mutates_args=("out",), tags=ANY_STRIDES)
def product_to_rows(
    out: Tensor, a: Tensor, b: Tensor, start: int, left: Tensor, host: Tensor | None, piece: int
) -> None:
    """Rows start..start + n of `out` become a [n, K] times b [K, M], as many as are computed."""
    make_product_to_rows(out, a, b, start, left, host, piece)


def make_product_to_rows(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    start: int,
    left: Tensor,
    host: Tensor | None,
    piece: int,
    room: Tensor | None = None,
) -> None:
    """The same; see `counted_kernels.product_of_rows` for `room`."""
    most = a.shape[0]
    n = rows_of_piece(left, host, piece, most)
    if n is None:
        rows = out.narrow(0, start, most)
        if is_to_load(left, rows, a, b):
            gemm.product(rows, a, b, False)
        if not counted_kernels.product_of_rows(rows, a, b, left.select(0, piece), room=room):
            gemm.product(rows, a, b, False)
    elif n:
        gemm.product(out.narrow(0, start, n), a.narrow(0, 0, n), b, False)


@product_to_rows.register_fake
def _(out: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> None:
    torch._check(a.shape[1] == b.shape[0], lambda: "the factors do not fit")


@torch.library.custom_op("inductor_ce::frequent_rows", mutates_args=(), tags=ANY_STRIDES)
def frequent_rows(
    kept: Tensor,
    rows: Tensor,
    order: Tensor | None,
    counted: Tensor | None,
    left: Tensor | None = None,
    host: Tensor | None = None,
) -> Tensor:
    """kept' [R, N] times rows [N, M], in float32.

    `kept` has its rows in `order` [N], if that is given. Of those that do not count, or are not computed,
    neither factor is looked at; where the device alone knows these, they are 0 in `kept`. Never is there a
    copy of all rows.
    """
    made = _empty_frequent_rows(kept, rows)
    make_frequent_rows(made, kept, rows, order, counted, left, host)
    return made


def make_frequent_rows(
    made: Tensor,
    kept: Tensor,
    rows: Tensor,
    order: Tensor | None,
    counted: Tensor | None,
    left: Tensor | None,
    host: Tensor | None,
    room: Tensor | None = None,
) -> None:
    """`made` becomes it; see `sum_kernels.frequent_rows` for `room`."""
    has_kernel = kept.is_cuda and kept.dtype == rows.dtype and kept.itemsize == 2 and kept.stride(1) == 1
    if has_kernel and (order is not None or room is not None):
        limit = limit_of_piece(left, host, 0, len(rows))
        sum_kernels.frequent_rows(made, kept, rows, order, counted, limit, room)
        return
    if order is None or counted is None:
        gemm.product(made, kept.t(), rows, False)
        return
    n = rows_of_piece(left, host, 0, len(rows))
    n = len(rows) if n is None else n
    if not n:
        made.zero_()
        return
    (fill,) = by_device(rows, _fill_rows)
    most = max(TAKEN_BYTES // (rows.shape[1] * rows.itemsize) // ALIGNED, 1) * ALIGNED
    taken = rows.new_empty((min(n, most), rows.shape[1]))
    for start in range(0, n, most):
        count = min(n - start, most)
        fill(rows, order[start:], counted[start:], count, taken)
        gemm.product(made, kept[start : start + count].t(), taken[:count], start > 0)


@frequent_rows.register_fake
def _empty_frequent_rows(kept: Tensor, rows: Tensor, *_: Any, **__: Any) -> Tensor:
    return rows.new_empty((kept.shape[1], rows.shape[1]), dtype=torch.float32)


# The form in which graphs hold them.
FREQUENT_ROWS = torch.ops.inductor_ce.frequent_rows.default
ROW_ORDER = torch.ops.inductor_ce.row_order.default
HOST_COPY = torch.ops.inductor_ce.host_copy.default
RECORDED = torch.ops.inductor_ce.recorded.default
PRODUCT_TO_ROWS = torch.ops.inductor_ce.product_to_rows.default
TAKE_ROWS = torch.ops.inductor_ce.take_rows.default
