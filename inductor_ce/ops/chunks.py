"""A head in token chunks as one operator: the body of a chunk, done for one after another.

    chunks  (a [N, D], b [D, V], ..., ends [P])   the statistics [K, N], and the gradients that are wanted

A chunk is what `take_rows`, `logits`, `row_stats_grad`, `product_to_rows` or `product_into`, and
`product_but` or `product_into` do, in this order. Before all of them is done what `row_order` and
`most_frequent` do, and `frequent_rows` behind. As one operator what is needed for a time is allocated once, a
graph and its code do not grow with the number of chunks, and on a GPU the host launches the kernels of all
chunks at once: see `tapes.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.compat.graphs import FakeTensor
from .chunk_memory import WORD, How, Read, bytes_of, divided
from .counted import (
    limit_of_piece,
    make_frequent_rows,
    make_left,
    make_numbers,
    make_order,
    make_product_to_rows,
    make_rows,
    put_back_statistics,
)
from .gemm import ANY_STRIDES
from .label_products import add_product_but, make_runs
from .one_read import row_stats_grad
from .products import add_product, make_logits, sums_of_columns

if importlib.util.find_spec("triton"):  # which torch's builds for GPUs bring
    from . import product_kernels, sum_kernels
    from .tapes import Tapes

    _tapes = Tapes()


@torch.library.custom_op("inductor_ce::chunks", mutates_args=(), tags=ANY_STRIDES)
def chunks(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    labels: list[Tensor],
    weights: list[Tensor],
    given: list[Tensor],
    which: str,
    program: str,
    ends: list[int],
    counts: Tensor | None,
    rows: Tensor | None,
    beside: Tensor | None,
    but: list[Tensor],
    often: int,
    sums: bool,
    *,
    chain: str = "",
    logits: torch.dtype | None = None,
    hidden: torch.dtype | None = None,
    weight: torch.dtype | None = None,
) -> list[Tensor]:
    """Statistics of the logits a b + bias, and the gradients that follow from theirs, chunk by chunk.

    Args:
        a, b, bias: hidden states [N, D], weight [D, V], and [V], [1] or none.
        labels, weights, given, which, program, chain: as for `row_stats_grad`, of all N rows.
        ends: where each of P chunks ends; the last one at N.
        counts: which rows count, [N]; these come first then: see `counted.py`. The program is given, as its
            last number, whether a row does.
        rows: a weight [V, M], where the gradient of the hidden states is wanted.
        beside: hidden states [N, M], where that of the weight is wanted.
        but: none, or the labels [N] whose entries are left out of the weight's gradient.
        often: of so many classes, R, the rows are made in float32 then.
        sums: whether the bias's gradient is wanted.
        logits, hidden, weight: the dtypes in which these, and sums of them, are made.

    Returns:
        The statistics [K, N], 1 in rows that do not count, and of these what is wanted: the gradient of the
        hidden states [N, M]; that of the weight [V, M]; with `but` the entries that are kept beside it,
        [N, W], what `frequent_rows` makes of them, [R, M], and where labels are, as `most_frequent` tells;
        that of the bias [V]; with `counts` the place of each row in the order of the chunks, [N], in which
        the gradient of the hidden states and what is kept are.
    """
    read = Read(a, b, bias, labels, weights, given, counts, rows, beside, but)
    how = How(which, program, chain, (*ends,), often, sums, logits, hidden, weight)
    body = _Body(read, how)
    if a.is_cuda and not isinstance(a, FakeTensor):
        made = _tapes.run(how, read.tensors(), body.make, body.do)
    else:
        body.do(made := body.make())
    return [*made[:-1]]


@chunks.register_fake
def _(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    labels: list[Tensor],
    weights: list[Tensor],
    given: list[Tensor],
    which: str,
    program: str,
    ends: list[int],
    counts: Tensor | None,
    rows: Tensor | None,
    beside: Tensor | None,
    but: list[Tensor],
    often: int,
    sums: bool,
    *,
    chain: str = "",
    logits: torch.dtype | None = None,
    hidden: torch.dtype | None = None,
    weight: torch.dtype | None = None,
) -> list[Tensor]:
    torch._check(a.shape[1] == b.shape[0], lambda: "the factors do not fit")
    read = Read(a, b, bias, labels, weights, given, counts, rows, beside, but)
    return read.empty(How(which, program, chain, (*ends,), often, sums, logits, hidden, weight))


class _Body:
    """What is done, by `body.do(body.make())`.

    Args:
        read, how: what `chunks` is given.
    """

    def __init__(self, read: Read, how: How):
        self._read, self._how = read, how

    def make(self) -> list[Tensor]:
        """What `chunks` returns, to be written, and behind it what is needed for a time."""
        read, how = self._read, self._how
        self._kernel = read.kernel(how) if read.a.is_cuda else None
        self._sizes = read.scratch(how, 0 if self._kernel is None else self._kernel.words)
        return [*read.empty(how), read.a.new_empty(bytes_of(self._sizes), dtype=torch.uint8)]

    def do(self, made: Sequence[Tensor]) -> None:
        read, how = self._read, self._how
        *results, scratch = made
        self._parts = divided(scratch, self._sizes)
        self._made = self._stats = results.pop(0)
        self._hidden = results.pop(0) if read.rows is not None else None
        self._weight = results.pop(0) if read.beside is not None else None
        self._kept, self._often, self._runs = (results.pop(0) if read.but else None for _ in range(3))
        self._sums = results.pop(0) if how.sums else None
        self._place = results.pop(0) if read.counts is not None else None
        self._sources, self._left = read.sources(), self._parts["left"]
        self._labels, self._given, self._but = read.labels, read.given, read.but
        self._do_all()

    def _do_all(self) -> None:
        n, step = self._read.a.shape[0], self._how.ends[0]
        if self._read.counts is not None and self._place is not None:
            self._order_rows(self._read.counts, self._place)
        make_left(self._left, self._parts.get("count", n), step)
        if self._runs is not None:
            self._find_frequent(self._runs)
        pieces = self._how.pieces
        if isinstance(self._stats, FakeTensor):  # a rehearsal, for which those between are as the second
            pieces = [*pieces[:2], *pieces[2:][-1:]]
        for piece, start, end in pieces:
            self._chunk(piece, start, end - start)
        if self._kept is not None and self._often is not None:
            kept, which = self._kept.narrow(1, 0, len(self._often)), (self._parts.get("order"), self._counted)
            make_frequent_rows(self._often, kept, self._sources[-1], *which, self._left, None, self._room)
        if self._sums is not None and "sums" in self._parts:
            sum_kernels.add_up(self._sums, self._parts["sums"])
        if self._read.counts is not None and self._place is not None:
            put_back_statistics(self._made, self._stats, self._place, self._read.counts)

    @property
    def _room(self) -> Tensor:
        return self._parts["room"]

    @property
    def _counted(self) -> Tensor | None:
        return self._parts.get("counted")

    def _order_rows(self, counts: Tensor, place: Tensor) -> None:
        """Rows that count come before others, in all that is read of them."""
        parts, order = self._parts, self._parts["order"]
        make_order(counts, order, place, parts["count"])
        self._stats = parts["stats"]
        make_numbers(parts["counted"], counts, order, counts, 0)
        self._labels = [self._in_order(f"labels {k}", x, -1) for k, x in enumerate(self._labels)]
        given = [self._in_order(f"given {k}", x, 0) if x.dim() else x for k, x in enumerate(self._given)]
        self._given = [*given, parts["counted"]]

    def _in_order(self, name: str, x: Tensor, otherwise: int) -> Tensor:
        out = self._parts[name]
        assert self._read.counts is not None
        make_numbers(out, x, self._parts["order"], self._read.counts, otherwise)
        return out

    def _find_frequent(self, runs: Tensor) -> None:
        labels = self._but
        if self._read.counts is not None:
            labels = [self._parts[f"all but {k}"] for k in range(len(self._but))]
            for k, label in enumerate(labels):
                make_numbers(label, self._but[k], None, self._read.counts, -1)
            self._but = [self._in_order(f"but {k}", x, -1) for k, x in enumerate(self._but)]
        make_runs(self._parts["columns"], runs, self._read.b.shape[1], labels, self._room)

    def _chunk(self, piece: int, *own: int) -> None:
        """The rows from one on, so many."""
        read, z = self._read, self._first("z", own).narrow(1, 0, self._read.b.shape[1])
        a, *others = (self._rows(k, piece, *own) for k in range(len(self._sources)))
        make_logits(z, a, read.b, read.bias, self._left, None, piece)
        self._make_gradient(z, piece, *own)
        self._add_to_sums(z, piece)
        self._add_to_hidden(z, piece, *own)
        self._add_to_weight(z, others[0] if others else a, piece, *own)

    def _first(self, name: str, own: tuple[int, ...]) -> Tensor:
        """Of what there is for a time as many rows as a chunk has."""
        return self._parts[name].narrow(0, 0, own[1])

    def _rows(self, k: int, piece: int, *own: int) -> Tensor:
        """The rows of a chunk of one of the sources."""
        source, counted = self._sources[k], self._counted
        if counted is None:
            return source.narrow(0, *own)
        taken, order = self._first(f"taken {k}", own), self._parts["order"]
        make_rows(taken, source, order.narrow(0, *own), counted.narrow(0, *own), self._left, None, piece)
        return taken

    def _make_gradient(self, z: Tensor, piece: int, *own: int) -> None:
        """The statistics of a chunk's logits, and their gradient over these."""
        stats, weights, how = self._stats.narrow(1, *own), self._read.weights, self._how
        labels = [x.narrow(0, *own) for x in self._labels]
        given = [x.narrow(0, *own) if x.dim() else x for x in self._given]
        kernel = self._kernel
        if kernel is None:
            both = row_stats_grad(z, labels, weights, how.which, given, how.program, chain=how.chain)
            stats.copy_(both[0])
            z.copy_(both[1])
            return
        words = self._room.narrow(0, 0, len(z) * kernel.words * WORD).view(torch.int64)
        product_kernels.clear(words)
        kernel(z, stats, labels, weights, given, self._left.select(0, piece), words)

    def _add_to_sums(self, dz: Tensor, piece: int) -> None:
        parts = self._parts.get("sums")
        if parts is not None:
            limit = limit_of_piece(self._left, None, piece, len(dz))
            sum_kernels.sums_over_rows(parts, dz, limit, piece > 0)
        elif self._sums is not None:
            made = sums_of_columns(dz, self._left, None, piece)
            self._sums.copy_(made if piece == 0 else self._sums + made)

    def _add_to_hidden(self, dz: Tensor, piece: int, *own: int) -> None:
        if self._hidden is not None and self._read.rows is not None:
            make_product_to_rows(
                self._hidden, dz, self._read.rows, own[0], self._left, None, piece, self._room
            )

    def _add_to_weight(self, dz: Tensor, rows: Tensor, piece: int, *own: int) -> None:
        limit = self._left, None, piece
        if self._weight is None:
            return
        if self._kept is None:
            add_product(self._weight, dz.t(), rows, piece > 0, *limit)
            return
        labels, how = [label.narrow(0, *own) for label in self._but], (own[0], piece > 0, False)
        add_product_but(self._weight, self._kept, dz, rows, labels, self._parts["columns"], *how, *limit)


# The form in which graphs hold it.
CHUNKS = torch.ops.inductor_ce.chunks.default
