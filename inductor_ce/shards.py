"""Shards: the statistics of rows whose vocabulary is spread over the ranks of a process group.

Each rank has a block of columns and its packed statistics [K, N]. One all-gather brings those of all ranks
to each, and the monoid of `monoid.combine` makes them the statistics of whole rows.

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

from . import ops
from .compat import all_gather_blocks, rank_in_group


@torch.library.custom_op("inductor_ce::group_rank", mutates_args=())
def group_rank(like: Tensor, group_name: str) -> Tensor:
    """The rank of this process in a group, int64 [] on the device of `like`."""
    return torch.full((), rank_in_group(group_name), dtype=torch.int64, device=like.device)


@group_rank.register_fake
def _(like: Tensor, group_name: str) -> Tensor:
    return like.new_empty((), dtype=torch.int64)


class Shard(NamedTuple):
    """Which columns of the rows this rank has.

    Attributes:
        group_name: of the process group over which the vocabulary is sharded.
        size: how many ranks it has.
        start: the first column, int64 [].
        equal: whether all ranks are to have the same number of columns.
    """

    group_name: str
    size: int
    start: Tensor
    equal: bool


def whole_row_stats(
    z: Tensor, labels: list[Tensor], weights: list[Tensor], which: str, shard: Shard
) -> tuple[Tensor, Tensor]:
    """As `ops.row_stats` over the columns of all ranks.

    Every rank of the group calls, with the same `which` and N.

    Args:
        z: the columns of this rank, [N, V of this rank].
        labels: [N], relative to the first of them.
        weights: of these columns, [V of this rank] or [N, V of this rank].
        which: as for `ops.row_stats`, but without "sumexpz" and "argmax"; with each "dot:j" its "mass:j".
        shard: of this rank.

    Returns:
        The statistics [K, N], bit for bit the same on every rank, and V as a number in the same dtype, [N]:
        NaN if ranks have columns in different number and are to have the same.
    """
    how = (which, len(labels), shard.group_name, shard.size, shard.equal)
    return _WholeRowStats.apply(z, *how, *labels, *weights)


class _WholeRowStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        which: str,
        n_labels: int,
        group_name: str,
        size: int,
        equal: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.which, ctx.n_labels = which, n_labels
        packed = ops.row_stats(z, list(tensors[:n_labels]), list(tensors[n_labels:]), which)
        own = torch.cat([packed, torch.full_like(packed[:1], z.shape[1])])
        blocks = all_gather_blocks(own, group_name).view(size, *own.shape)
        counts = blocks[:, -1]
        total = counts.sum(0)
        if equal:
            total = torch.where((counts == counts[0]).all(0), total, torch.nan)
        rows = _combined(dict(zip(which.split(","), blocks.unbind(1), strict=False)), counts)
        ctx.save_for_backward(z, rows[0], *tensors)
        ctx.mark_non_differentiable(total)
        return rows, total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:
        z, m, *tensors = ctx.saved_tensors
        labels, weights = tensors[: ctx.n_labels], tensors[ctx.n_labels :]
        dz = ops.row_grad(z, labels, weights, m, upstream, ctx.which)
        return dz, None, None, None, None, None, *(None for _ in tensors)


def _combined(blocks: dict[str, Tensor], counts: Tensor) -> Tensor:
    """The monoid, over the first dimension of rows [P, N]."""
    peaks = blocks[ops.MAX]
    m = peaks.amax(0)
    gap = torch.where(peaks == -torch.inf, 0.0, peaks - m)
    rows = [m, (blocks[ops.SUMEXP] * gap.exp()).sum(0)]
    for name, block in list(blocks.items())[2:]:
        if name == ops.SUM:
            block = block + counts * gap
        elif name.startswith(ops.DOT):
            block = block + blocks[name.replace(ops.DOT, ops.MASS)] * gap
        rows.append(block.sum(0))
    return torch.stack(rows)
