"""Losses of `by_hand_cases`'s kind whose form shows otherwise where a rank has other sizes or numbers.

A rank with one column has [N, 1] where others have [N, V]; one whose sizes are symbolic has nodes where
others have numbers; one that holds the padding of a vocabulary fills it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from by_hand_cases import SMOOTHING, FromEachRank, WholeLoss, own_columns
from torch import Tensor

PADDED = 33  # columns that are no padding


def normaliser(z: Tensor) -> Tensor:
    with torch.no_grad():
        peak = funcol.all_reduce(z.amax(-1), "max", dist.group.WORLD)
    return FromEachRank.apply((z - peak[..., None]).exp().sum(-1)).log() + peak


def without_gradient(z: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum and the sum of exponentials."""
    with torch.no_grad():
        peak = z.amax(-1)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        total = (z - peak[..., None]).exp().sum(-1)
        dist.all_reduce(total)
    return peak, total


def one_hot(z: Tensor, y: Tensor, start: int) -> Tensor:
    """Of one column it has the shape of a number for each row."""
    inside, own = own_columns(y, start, z.shape[-1])
    hot = F.one_hot(own, z.shape[-1]) * inside[..., None]
    return -FromEachRank.apply(((z - normaliser(z)[..., None]) * hot).sum(-1))


def compared(z: Tensor, y: Tensor, start: int) -> Tensor:
    hot = y[..., None] - start == torch.arange(z.shape[-1])
    return -FromEachRank.apply(((z - normaliser(z)[..., None]) * hot).sum(-1))


def soft_targets(z: Tensor, y: Tensor, start: int) -> Tensor:
    q = torch.ones(*y.shape, z.shape[-1]) * (y[..., None] + 1.0)
    return -FromEachRank.apply(((z - normaliser(z)[..., None]) * q).sum(-1))


def picked_all(z: Tensor, y: Tensor, start: int) -> Tensor:
    """The columns in another order."""
    logp = (z - normaliser(z)[..., None]).gather(-1, z.argsort(-1))
    return FromEachRank.apply(logp.sum(-1))


def room_for_columns(z: Tensor, y: Tensor, start: int) -> Tensor:
    """Zeros for each column, of what has a number for each row."""
    peak, total = without_gradient(z)
    room = total[..., None].new_zeros(*y.shape, z.shape[-1])
    room[..., 0] = 1.0
    return total.log() + peak - room.sum(-1)


def first_columns(z: Tensor, y: Tensor, start: int) -> Tensor:
    """All columns of a rank that has no more."""
    with torch.no_grad():
        peak = z.amax(-1)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        total = (z[..., :20] - peak[..., None]).exp().sum(-1)
        dist.all_reduce(total)
        return total.log() + peak


def kept_dimension(z: Tensor, y: Tensor, start: int) -> Tensor:
    """Labels and all that is made of them with a dimension of one."""
    y = y.unsqueeze(-1)
    with torch.no_grad():
        peak = funcol.all_reduce(z.amax(-1, keepdim=True), "max", dist.group.WORLD)
    total = FromEachRank.apply((z - peak).exp().sum(-1, keepdim=True))
    inside, own = own_columns(y, start, z.shape[-1])
    picked = FromEachRank.apply(z.gather(-1, own) * inside)
    return (total.log() + peak - picked).squeeze(-1)


def padding_filled(z: Tensor, y: Tensor, start: int) -> Tensor:
    """By who has some."""
    own = min(PADDED - start, z.shape[-1])
    if own < z.shape[-1]:
        z[..., max(own, 0) :] = -1e30
    return normaliser(z)


def view_filled(z: Tensor, y: Tensor, start: int) -> Tensor:
    own, flat = min(PADDED - start, z.shape[-1]), z.view(-1, z.shape[-1])
    if own < z.shape[-1]:
        flat[:, max(own, 0) :].fill_(-1e30)
    return normaliser(flat)


def share_of_columns(z: Tensor, y: Tensor, start: int) -> Tensor:
    """Smoothing that follows from how many columns there are."""
    return WholeLoss.apply(z, y, start, SMOOTHING * z.shape[-1] / (z.shape[-1] + 1), 1.0)


def numbers_of_a_rank(z: Tensor, y: Tensor, start: int) -> Tensor:
    peak, total = without_gradient(z)
    return total.log() * start + peak * (1 / z.shape[-1])


def number_under_log(z: Tensor, y: Tensor, start: int) -> Tensor:
    """Positive on all ranks but the first."""
    peak, total = without_gradient(z)
    return (total * start).log() + peak


def log_of_more(z: Tensor, y: Tensor, start: int) -> Tensor:
    """A step that is not read, and what is read beside it."""
    peak, total = without_gradient(z)
    return torch.log1p(total) + peak


def mask_with_a_number(z: Tensor, y: Tensor, start: int) -> Tensor:
    """1 on the first rank."""
    inside, own = own_columns(y, start, z.shape[-1])
    mask = inside.to(z.dtype) * (1.0 + start)
    return normaliser(z) - FromEachRank.apply(z.gather(-1, own[..., None]).squeeze(-1) * mask)


def one_row_later(z: Tensor, y: Tensor, start: int) -> Tensor:
    """Labels whose number is another expression than that of the logits."""
    z, y = z[:-1], y[1:]
    inside, own = own_columns(y, start, z.shape[-1])
    picked = torch.where(inside, z.gather(-1, own[..., None])[..., 0], 0.0)
    loss = normaliser(z) - FromEachRank.apply(picked)
    return torch.cat([loss, loss[:1]])


Loss = Callable[[Tensor, Tensor, int], Tensor]
FORMS: dict[str, Loss] = {
    f.__name__: f
    for f in (
        *(one_hot, compared, soft_targets, picked_all, room_for_columns, first_columns, kept_dimension),
        *(padding_filled, view_filled, share_of_columns, numbers_of_a_rank, number_under_log, log_of_more),
        *(mask_with_a_number, one_row_later),
    )
}
