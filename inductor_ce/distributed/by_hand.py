"""The statistics of rows whose ranks hold plain tensors, and know themselves which labels are theirs.

As in `shards`, one all-gather brings the statistics of all ranks to each, and the backward has no collective.
But no rank knows which columns the others have: a label is that of a column of this rank, or of none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..common.compat.distributed import all_gather_blocks
from ..ops.combine import combined
from ..ops.rows import law_of


def stats_of_ranks(
    z: Tensor, labels: list[Tensor], group_name: str, size: int, site: int = ops.NO_SITE
) -> tuple[Tensor, Tensor]:
    """The maximum, the sum of exponentials and the labels' logits of rows that a group shares.

    Every rank of the group calls, with as many labels and the same N.

    Args:
        z: the columns of this rank, [N, V of this rank].
        labels: of each row one of these columns, or a negative number where it has none here, [N].
        group_name: of the process group.
        size: how many ranks it has.
        site: as for `ops.row_stats`.

    Returns:
        The statistics "max,sumexp,pick,..." of whole rows [2 + L, N], a label's logit summed over the ranks
        that have it; and how many have it, [L, N]. Both are bit for bit the same on every rank.
    """
    return _StatsOfRanks.apply(z, group_name, size, site, *labels)


class _StatsOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, group_name: str, size: int, site: int, *labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        which = ops.Rows.of(len(labels)).encode()
        law = law_of(which, len(labels), 0, ())
        own = ops.row_stats(z, list(labels), [], which, site=site)
        here = [((y >= 0) & (y < z.shape[1])).to(own.dtype) for y in labels]
        blocks = all_gather_blocks(torch.cat([own, *(row.unsqueeze(0) for row in here)]), group_name)
        blocks = blocks.view(size, -1, own.shape[1])
        packed = combined(law, blocks[:, : len(own)], blocks.new_zeros(size, 1))
        hits = blocks[:, len(own) :].sum(0)
        ctx.which, ctx.site = which, site
        ctx.save_for_backward(z, packed[0], *labels)
        ctx.mark_non_differentiable(hits)
        return packed, hits

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:
        z, m, *labels = ctx.saved_tensors
        dz = ops.row_grad(z, labels, [], m, upstream, ctx.which, site=ctx.site)
        return dz, None, None, None, *(None for _ in labels)
