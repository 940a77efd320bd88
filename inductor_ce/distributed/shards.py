"""Shards: the statistics of rows whose vocabulary is spread over the ranks of a process group.

Each rank has a block of columns and its packed statistics [K, N]. One all-gather brings those of all ranks
to each, and the law of `ops.combine` makes them the statistics of whole rows.

NOTE Why the backward has no collective. Every rank computes the same loss of the same statistics, so the
same gradients reach them everywhere; and the gradient of a column needs nothing else but its own logit and
the row's maximum, which is that of all ranks here.

NOTE Why the rank is an operator. torch.compile would make a constant of it, in code that caches hand to
other ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..common.compat.distributed import all_gather_blocks, all_reduce_sum
from ..ops.combine import combined, own_rows


def with_summed_gradient(x: Tensor, group_name: str) -> Tensor:
    """x, whose gradient is the sum of those that reach it on the ranks of a group.

    Every rank of the group calls, and x requires a gradient on all or on none.
    """
    return _WithSummedGradient.apply(x, group_name)


class _WithSummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(upstream.contiguous(), ctx.group_name), None


class Shard(NamedTuple):
    """Which columns of the rows this rank has.

    Attributes:
        group_name: of the process group over which the vocabulary is sharded.
        size: how many ranks it has.
        start: the first column, int64 [].
        equal: whether all ranks are to have the same number of columns.
        counts: how many each rank has, [P], where that is known; else the ranks tell.
    """

    group_name: str
    size: int
    start: Tensor
    equal: bool
    counts: Tensor | None = None


def whole_row_stats(
    z: Tensor,
    labels: list[Tensor],
    weights: list[Tensor],
    rows: ops.Rows,
    shard: Shard,
    masses: dict[int, Tensor] | None = None,
    site: int = ops.NO_SITE,
) -> tuple[Tensor, Tensor]:
    """As `ops.row_stats` over the columns of all ranks.

    Every rank of the group calls, with the same `rows` and N.

    Args:
        z: the columns of this rank, [N, V of this rank].
        labels: [N], relative to the first of them.
        weights: of these columns, [V of this rank] or [N, V of this rank].
        rows: as `which` for `ops.row_stats`, but closed: see `Rows.closed`.
        shard: of this rank.
        masses: for weights j that every rank knows, the sum of them over the columns of each rank, [P].
        site: as for `ops.row_stats`.

    Returns:
        The statistics [K, N], bit for bit the same on every rank, and V as a number in the same dtype, [N]:
        NaN if ranks have columns in different number and are to have the same.
    """
    known = masses or {}
    how = (rows, site, len(labels), len(weights), tuple(known), shard.group_name, shard.size, shard.equal)
    tensors = (*labels, *weights, *known.values())
    return _WholeRowStats.apply(z, shard.start, *how, shard.counts, *tensors)


class _WholeRowStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        start: Tensor,
        rows: ops.Rows,
        site: int,
        n_labels: int,
        n_weights: int,
        known: tuple[int, ...],
        group_name: str,
        size: int,
        equal: bool,
        counts: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.which, ctx.site, ctx.n_labels = rows.encode(), site, n_labels
        ctx.n_inputs = 11 + len(tensors)
        weights_end = n_labels + n_weights
        labels, weights = list(tensors[:n_labels]), list(tensors[n_labels:weights_end])
        own = own_rows(ops.row_stats(z, labels, weights, ctx.which, site=site), rows, start)
        if counts is None:
            own = torch.cat([own, torch.full_like(own[:1], z.shape[1])])
        blocks = all_gather_blocks(own, group_name).view(size, *own.shape)
        columns = blocks[:, -1] if counts is None else counts.to(own.dtype).unsqueeze(1)
        of_ranks = {
            j: mass.to(own.dtype).unsqueeze(1) for j, mass in zip(known, tensors[weights_end:], strict=True)
        }
        packed = combined(rows, blocks, columns, of_ranks)
        total = columns.sum(0)
        if equal:
            total = torch.where((columns == columns[0]).all(0), total, torch.nan)
        told = [column.to(torch.int64) - start for column in ops.told_columns(rows, packed)]
        ctx.n_told = len(told)
        ctx.save_for_backward(z, packed[0], *told, *labels, *weights)
        ctx.mark_non_differentiable(total)
        return packed, total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:
        z, m, *tensors = ctx.saved_tensors
        told, tensors = tensors[: ctx.n_told], tensors[ctx.n_told :]
        labels, weights = tensors[: ctx.n_labels], tensors[ctx.n_labels :]
        dz = ops.row_grad(z, labels + told, weights, m, upstream, ctx.which, site=ctx.site)
        return dz, *(None for _ in range(ctx.n_inputs - 1))
