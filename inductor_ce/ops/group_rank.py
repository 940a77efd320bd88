"""The rank of this process in a group, as a value of the graph.

NOTE Why the rank is an operator. torch.compile would make a constant of it, in code that caches hand to
other ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.compat.distributed import rank_in_group


@torch.library.custom_op("inductor_ce::group_rank", mutates_args=())
def group_rank(like: Tensor, group_name: str, equal: bool) -> Tensor:
    """The rank of this process in a group, int64 [] on the device of `like`.

    `equal` tells later passes whether all ranks of the group have the same number of columns, and so the same
    graph. Where they have not, what is exchanged must not depend on what a rank makes of its graph.
    """
    return torch.full((), rank_in_group(group_name), dtype=torch.int64, device=like.device)


@group_rank.register_fake
def _(like: Tensor, group_name: str, equal: bool) -> Tensor:
    return like.new_empty((), dtype=torch.int64)


GROUP_RANK = torch.ops.inductor_ce.group_rank.default
