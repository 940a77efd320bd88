"""Losses that ranks make together by collectives of their own, as Megatron-like code has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

SMOOTHING = 0.1


class WholeLoss(torch.autograd.Function):
    """In place, as memory is dear; the probabilities are what the backward keeps."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, start: int, smoothing: float, scale: float) -> Tensor:
        v = z.shape[-1]
        x = z.clone().float()
        peak = torch.max(x, dim=-1)[0]
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        x -= peak.unsqueeze(dim=-1)
        elsewhere = (y < start) | (y >= start + v)
        own = y.clone() - start
        own[elsewhere] = 0
        flat = own.view(-1)
        rows = torch.arange(flat.shape[0], device=z.device)
        picked = x.view(-1, v)[rows, flat].clone().contiguous().view_as(y)
        picked[elsewhere] = 0.0
        dist.all_reduce(picked)
        torch.exp(x, out=x)
        total = x.sum(dim=-1)
        dist.all_reduce(total)
        loss = torch.log(total) - picked
        x.div_(total.unsqueeze(dim=-1))
        if smoothing > 0:
            loss = (1.0 - smoothing) * loss - smoothing * torch.log(x).mean(dim=-1)
        ctx.smoothing, ctx.scale = smoothing, scale
        ctx.save_for_backward(x, elsewhere, flat)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        dz, elsewhere, flat = ctx.saved_tensors
        v = dz.shape[-1]
        dz_2d = dz.view(-1, v)
        rows = torch.arange(dz_2d.shape[0], device=dz.device)
        gain = 1.0 - elsewhere.view(-1).float()
        if ctx.smoothing > 0:
            dz_2d[rows, flat] -= (1.0 - ctx.smoothing) * gain
            dz_2d[rows, :] -= ctx.smoothing * (1 / v)
        else:
            dz_2d[rows, flat] -= gain
        dz.mul_(ctx.scale * upstream.unsqueeze(dim=-1))
        return dz, None, None, None, None


class FromEachRank(torch.autograd.Function):
    """A sum over ranks that hands its gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return funcol.all_reduce(x, "sum", dist.group.WORLD)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream


class LogProbability(torch.autograd.Function):
    """Out of place, with a backward that makes the probabilities anew."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, start: int) -> Tensor:
        v = z.shape[-1]
        elsewhere = (y < start) | (y >= start + v)
        own = (y - start).masked_fill(elsewhere, 0)
        peak = z.float().amax(dim=-1, keepdim=True)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        x = z.float() - peak
        total = x.exp().sum(-1, keepdim=True)
        dist.all_reduce(total)
        logp = x - total.log()
        picked = logp.gather(-1, own.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        dist.all_reduce(picked)
        ctx.save_for_backward(logp, elsewhere, own)
        return picked

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        logp, elsewhere, own = ctx.saved_tensors
        dz = -logp.exp() * upstream.unsqueeze(-1)
        hit = torch.where(elsewhere, 0.0, upstream)
        return dz.scatter_add(-1, own.unsqueeze(-1), hit.unsqueeze(-1)), None, None


def own_columns(y: Tensor, start: int, v: int) -> tuple[Tensor, Tensor]:
    inside = (y >= start) & (y < start + v)
    return inside, torch.where(inside, y - start, 0)


def whole_loss(z: Tensor, y: Tensor, start: int) -> Tensor:
    return WholeLoss.apply(z, y, start, 0.0, 1.0)


def smoothed(z: Tensor, y: Tensor, start: int) -> Tensor:
    """With the mean over the columns of this rank, as each rank's smoothing has them alone."""
    return WholeLoss.apply(z, y, start, SMOOTHING, 1.0)


def scaled_backward(z: Tensor, y: Tensor, start: int) -> Tensor:
    """Whose backward is twice the gradient: it is the user's to say."""
    return WholeLoss.apply(z, y, start, 0.0, 2.0)


def log_probability(z: Tensor, y: Tensor, start: int) -> Tensor:
    return -LogProbability.apply(z, y, start)


def regions(z: Tensor, y: Tensor, start: int) -> Tensor:
    """Plain operations between functions that sum over ranks."""
    with torch.no_grad():
        peak = funcol.all_reduce(z.amax(-1), "max", dist.group.WORLD)
    total = FromEachRank.apply((z - peak[..., None]).exp().sum(-1))
    inside, own = own_columns(y, start, z.shape[-1])
    picked = FromEachRank.apply(torch.where(inside, z.gather(-1, own[..., None]).squeeze(-1), 0.0))
    return total.log() + peak - picked


def moved_sums(z: Tensor, y: Tensor, start: int) -> Tensor:
    """Sums over the columns of each rank, moved from its own maximum to that of all."""
    own_peak = z.detach().amax(-1)
    with torch.no_grad():
        peak = funcol.all_reduce(own_peak, "max", dist.group.WORLD)
    total = FromEachRank.apply((z - own_peak[..., None]).exp().sum(-1) * (own_peak - peak).exp())
    inside, own = own_columns(y, start, z.shape[-1])
    gap = z.gather(-1, own[..., None]).squeeze(-1) - peak
    return total.log() - FromEachRank.apply(gap.masked_fill(~inside, 0.0))


def without_gradient(z: Tensor, y: Tensor, start: int) -> Tensor:
    """As a reference model's log-probabilities."""
    with torch.no_grad():
        peak = z.max(dim=-1, keepdim=True).values
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        total = (z - peak).exp().sum(dim=-1)
        dist.all_reduce(total)
        inside, own = own_columns(y, start, z.shape[-1])
        picked = (z - peak).gather(-1, own.unsqueeze(-1)).squeeze(-1) * inside
        dist.all_reduce(picked)
        return total.log() - picked


def own_logit(z: Tensor, y: Tensor, start: int) -> Tensor:
    """Of whoever has the label, 0 elsewhere."""
    inside, own = own_columns(y, start, z.shape[-1])
    return torch.where(inside, z.gather(-1, own.unsqueeze(-1)).squeeze(-1), 0.0)


def gathered_normalisers(z: Tensor, y: Tensor, start: int) -> Tensor:
    """Each rank's own normaliser, gathered in a list."""
    with torch.no_grad():
        own = torch.logsumexp(z, dim=-1)
        of_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, own)
        picked = own_logit(z, y, start)
        dist.all_reduce(picked)
        return torch.logsumexp(torch.stack(of_ranks), dim=0) - picked


def gathered_in_one_tensor(z: Tensor, y: Tensor, start: int) -> Tensor:
    """The logits at the labels as well."""
    with torch.no_grad():
        size = dist.get_world_size()
        own, picked = z.logsumexp(-1, keepdim=True), own_logit(z, y, start)
        normalisers = own.new_empty(size * own.shape[0], *own.shape[1:])
        dist.all_gather_into_tensor(normalisers, own)
        picks = funcol.all_gather_tensor(picked[None], 0, dist.group.WORLD)
        return normalisers.view(size, *picked.shape).logsumexp(0) - picks.sum(0)


class GatheredLoss(torch.autograd.Function):
    """Whose backward is the softmax of the whole row, less the label's."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, start: int) -> Tensor:
        inside, own = own_columns(y, start, z.shape[-1])
        of_ranks = funcol.all_gather_tensor(torch.logsumexp(z, -1)[None], 0, dist.group.WORLD)
        lse = torch.logsumexp(of_ranks, 0)
        picked = z.gather(-1, own[..., None]).squeeze(-1).masked_fill(~inside, 0.0)
        dist.all_reduce(picked)
        ctx.save_for_backward(z, lse, inside, own)
        return lse - picked

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        z, lse, inside, own = ctx.saved_tensors
        dz = (z - lse[..., None]).exp() * upstream[..., None]
        hit = torch.where(inside, -upstream, 0.0)
        return dz.scatter_add(-1, own[..., None], hit[..., None]), None, None


def gathered_loss(z: Tensor, y: Tensor, start: int) -> Tensor:
    return GatheredLoss.apply(z, y, start)


class CopyFromEachRank(FromEachRank):
    """In place, on a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x


def largest(z: Tensor) -> Tensor:
    with torch.no_grad():
        peak = z.max(-1).values
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return peak


def regions_of_copies(z: Tensor, y: Tensor, start: int) -> Tensor:
    """The label's logit taken off its dimension by an index, and zeros like it where another rank has it."""
    peak = largest(z)
    total = CopyFromEachRank.apply((z - peak[..., None]).exp().sum(-1))
    inside, own = own_columns(y, start, z.shape[-1])
    picked = torch.gather(z, -1, own[..., None])[..., 0]
    picked = CopyFromEachRank.apply(torch.where(inside, picked, torch.zeros_like(picked)))
    return total.log() + peak - picked


class InPlaceOfEachRank(FromEachRank):
    """In the place of what is given, and the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        dist.all_reduce(x.contiguous())
        return x


class ContiguousFromEachRank(FromEachRank):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x


def regions_in_place(z: Tensor, y: Tensor, start: int) -> Tensor:
    """What was summed is read by the name that it had, and by its new one."""
    peak = largest(z)
    own_total = (z - peak[..., None]).exp().sum(-1)
    total = InPlaceOfEachRank.apply(own_total)
    inside, own = own_columns(y, start, z.shape[-1])
    picked = torch.where(inside, torch.gather(z, -1, own[..., None])[..., 0], 0.0)
    both = 0.5 * total.log() + 0.5 * own_total.log()
    return both + peak - ContiguousFromEachRank.apply(picked)


class OutOfPlace(WholeLoss):
    """With a backward that keeps the probabilities, and broadcasts its upstream gradient by an index."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        p, elsewhere, flat = ctx.saved_tensors
        dz = p.clone()
        dz[torch.arange(dz.shape[0], device=dz.device), flat] -= 1.0 - elsewhere.float()
        return dz * upstream[:, None], None, None, None, None


def out_of_place(z: Tensor, y: Tensor, start: int) -> Tensor:
    return OutOfPlace.apply(z, y, start, 0.0, 1.0)


Loss = Callable[[Tensor, Tensor, int], Tensor]
LOSSES: dict[str, Loss] = {
    f.__name__: f
    for f in (
        *(whole_loss, smoothed, scaled_backward, out_of_place, log_probability),
        *(regions, regions_of_copies, regions_in_place, moved_sums, without_gradient),
        *(gathered_normalisers, gathered_in_one_tensor, gathered_loss),
    )
}


# What looks alike, and is another function, or has another gradient


class Squared(torch.autograd.Function):
    """A backward of squares of probabilities."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        peak = z.amax(-1)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        e = (z - peak[..., None]).exp()
        total = e.sum(-1)
        dist.all_reduce(total)
        ctx.save_for_backward(e / total[..., None])
        return total.log() + peak

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        return p * p * upstream[..., None]


class Mean(FromEachRank):
    """A sum over ranks whose gradient is shared among them."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream / dist.get_world_size()


def squared_backward(z: Tensor, y: Tensor, start: int) -> Tensor:
    return Squared.apply(z)


def shared_gradient(z: Tensor, y: Tensor, start: int) -> Tensor:
    with torch.no_grad():
        peak = funcol.all_reduce(z.amax(-1), "max", dist.group.WORLD)
    total = Mean.apply((z - peak[..., None]).exp().sum(-1))
    return total.log() + peak


def summed_normalisers(z: Tensor, y: Tensor, start: int) -> Tensor:
    """The sum of the ranks' own normalisers is none."""
    peak = z.detach().amax(-1)
    return FromEachRank.apply((z - peak[..., None]).exp().sum(-1).log() + peak)


def probabilities_kept(z: Tensor, y: Tensor, start: int) -> Tensor:
    with torch.no_grad():
        peak = funcol.all_reduce(z.amax(-1), "max", dist.group.WORLD)
    e = (z - peak[..., None]).exp()
    total = FromEachRank.apply(e.sum(-1))
    p = e / total[..., None]
    return total.log() + peak - (p * p.roll(1, -1)).sum(-1)


def scaled_by_rank(z: Tensor, y: Tensor, start: int) -> Tensor:
    """What each rank weighs otherwise is no logit of a whole row."""
    with torch.no_grad():
        peak = funcol.all_reduce(z.amax(-1), "max", dist.group.WORLD)
    total = FromEachRank.apply((z - peak[..., None]).exp().sum(-1))
    inside, own = own_columns(y, start, z.shape[-1])
    picked = z.gather(-1, own[..., None]).squeeze(-1) * (1.0 + start)
    return total.log() + peak - FromEachRank.apply(torch.where(inside, picked, 0.0))


def scaled_in_place(z: Tensor, y: Tensor, start: int) -> Tensor:
    """The same, of logits that are masked in place: who scales them still reads what was written."""
    with torch.no_grad():
        peak = z.amax(-1)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        total = (z - peak[..., None]).exp().sum(-1)
        dist.all_reduce(total)
        inside, own = own_columns(y, start, z.shape[-1])
        picked = z.gather(-1, own[..., None]).squeeze(-1).clone()
        picked[~inside] = 0.0
        return total.log() + peak - funcol.all_reduce(picked * (1.0 + start), "sum", dist.group.WORLD)


def overwritten(z: Tensor, y: Tensor, start: int) -> Tensor:
    """The logits themselves, as Megatron-LM does with those in float32."""
    with torch.no_grad():
        peak = z.amax(-1)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        total = z.sub_(peak[..., None]).exp().sum(-1)
        dist.all_reduce(total)
        return total.log()


def entropy(z: Tensor, y: Tensor, start: int) -> Tensor:
    with torch.no_grad():
        peak = funcol.all_reduce(z.amax(-1), "max", dist.group.WORLD)
    e = (z - peak[..., None]).exp()
    total = FromEachRank.apply(e.sum(-1))
    return total.log() + peak - FromEachRank.apply((e * z).sum(-1)) / total


def gradient_lost(z: Tensor, y: Tensor, start: int) -> Tensor:
    with torch.no_grad():
        peak = funcol.all_reduce(z.amax(-1), "max", dist.group.WORLD)
    total = (z - peak[..., None]).exp().sum(-1)
    return funcol.all_reduce(total, "sum", dist.group.WORLD).log() + peak


def averaged_normalisers(z: Tensor, y: Tensor, start: int) -> Tensor:
    with torch.no_grad():
        of_ranks = funcol.all_gather_tensor(torch.logsumexp(z, -1)[None], 0, dist.group.WORLD)
        return of_ranks.mean(0)


def without_one_rank(z: Tensor, y: Tensor, start: int) -> Tensor:
    """Of all ranks but the first."""
    with torch.no_grad():
        of_ranks = funcol.all_gather_tensor(torch.logsumexp(z, -1)[None], 0, dist.group.WORLD)
        return of_ranks[1:].logsumexp(0)


def gathered_and_kept(z: Tensor, y: Tensor, start: int) -> Tensor:
    """What was gathered is read by somebody else as well."""
    with torch.no_grad():
        own = torch.logsumexp(z, dim=-1)
        of_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, own)
        return torch.logsumexp(torch.stack(of_ranks), dim=0) - of_ranks[0]


NEAR_MISSES: dict[str, Loss] = {
    f.__name__: f
    for f in (
        squared_backward,
        shared_gradient,
        summed_normalisers,
        probabilities_kept,
        scaled_by_rank,
        scaled_in_place,
        averaged_normalisers,
        without_one_rank,
        gathered_and_kept,
        overwritten,
        entropy,
        gradient_lost,
    )
}


def measured(f: Any, z: Tensor, y: Tensor, start: int, upstream: Tensor) -> list[Tensor]:
    leaf = z.clone().requires_grad_()
    loss = f(leaf * 1.0, y.clone(), start)
    if loss.requires_grad:
        loss.backward(upstream.to(loss.dtype))
    return [loss.detach(), *([] if leaf.grad is None else [leaf.grad])]
