"""What the functional forms compute of logits: the loss and the lse of each row, and what a call returns."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..distributed.shards import Shard, whole_row_stats
from ..ops.group_rank import group_rank

Number = int | float


class Numbers(NamedTuple):
    """What may change from call to call, as numbers or tensors []."""

    z_loss_weight: Number | Tensor
    num_label_tokens: Number | Tensor | None
    vocab_start: int | Tensor | None


class Choices(NamedTuple):
    """What code is compiled for."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    softcap: float | None
    group_name: str | None
    group_size: int
    shift: int = 0


class _Rows(NamedTuple):
    """Of each row [N]: its loss, its lse, and its share in the mean."""

    loss: Tensor
    lse: Tensor
    share: Tensor


def loss_and_lse(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    mask: Tensor | None,
    numbers: Numbers,
    choices: Choices,
) -> tuple[Tensor, Tensor]:
    """The loss, [...] or [] by `choices.reduction`, and the lse [...] of logits [..., V].

    With `choices.shift`, the row before which `shift` others stand is that of a target, and so many rows at
    the end of the last dimension have none: all rows have their statistics, and the results leave these out.
    """
    shape = logits.shape[:-1]
    z = logits.reshape(math.prod(shape), logits.shape[-1])
    if choices.softcap is not None:
        z = choices.softcap * torch.tanh(z.to(ops.stats_dtype(z)) / choices.softcap)
    if class_weight is not None:
        class_weight = _valid_or_nan(class_weight.to(ops.stats_dtype(z)))
    counts = z.new_ones(shape, dtype=torch.bool) if mask is None else mask != 0
    if choices.shift:
        target, counts = (_moved(x, len(shape) - 1, choices.shift) for x in (target, counts))
    counts = counts.reshape(z.shape[0])
    shard = _shard(z, numbers, choices)
    if target.is_floating_point():
        rows = _of_probabilities(z, target.reshape(z.shape), class_weight, choices.label_smoothing, shard)
    else:
        y = target.reshape(z.shape[0]).long()
        counts = counts & (y != choices.ignore_index)
        rows = _of_labels(z, y, counts, class_weight, choices.label_smoothing, shard)
    w = _valid_or_nan(z.new_ones((), dtype=rows.lse.dtype) * numbers.z_loss_weight)
    loss = torch.where(counts, rows.loss + torch.where(w == 0, 0.0, w * rows.lse.square()), 0.0)
    lse = _paired(rows.lse.reshape(shape), choices.shift)
    if choices.reduction == "none":
        return _paired(loss.reshape(shape), choices.shift), lse
    total = loss.sum()
    if numbers.num_label_tokens is not None:
        total = total / numbers.num_label_tokens
    elif choices.reduction == "mean":
        total = total / torch.where(counts, rows.share, 0.0).sum()
    return total, lse


def _moved(x: Tensor, dim: int, shift: int) -> Tensor:
    """x from `shift` on, then zeros."""
    rest = x.narrow(dim, shift, x.shape[dim] - shift)
    return F.pad(rest, (0, 0) * (x.dim() - 1 - dim) + (0, shift))


def _paired(rows: Tensor, shift: int) -> Tensor:
    """The rows that have a target."""
    return rows.narrow(-1, 0, rows.shape[-1] - shift) if shift else rows


def _shard(z: Tensor, numbers: Numbers, choices: Choices) -> Shard | None:
    if choices.group_name is None:
        return None
    if numbers.vocab_start is None:
        start = group_rank(z, choices.group_name, True) * z.shape[1]
    else:
        start = z.new_ones((), dtype=torch.int64) * numbers.vocab_start
    return Shard(choices.group_name, choices.group_size, start, numbers.vocab_start is None)


def _of_labels(
    z: Tensor, y: Tensor, counts: Tensor, weight: Tensor | None, smoothing: float, shard: Shard | None
) -> _Rows:
    label = y if shard is None else y - shard.start
    weights = [] if weight is None or not smoothing else [_columns_of(weight, z, shard)]
    rows, total = _statistics(z, [label], weights, bool(smoothing) and weight is None, shard)
    log_d = rows["sumexp"].log()
    loss = log_d + (rows["max"] - rows["pick"])
    known = (y >= 0) & (y < total)
    share = torch.ones_like(loss)
    if weight is not None:
        share = weight.index_select(0, torch.where(known, y, 0))
        loss = share * loss
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * _to_all(rows, log_d, total, 0)
    loss = loss * torch.where(counts & ~known, torch.nan, 1.0)
    return _Rows(loss, rows["max"] + log_d, share)


def _of_probabilities(
    z: Tensor, q: Tensor, weight: Tensor | None, smoothing: float, shard: Shard | None
) -> _Rows:
    weights = [q]
    if weight is not None:
        own = _columns_of(weight, z, shard)
        weights = [q.to(own.dtype) * own] + ([own] if smoothing else [])
    rows, total = _statistics(z, [], weights, bool(smoothing) and weight is None, shard)
    log_d = rows["sumexp"].log()
    loss = _to_weighted(rows, log_d, 0)
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * _to_all(rows, log_d, total, 1)
    return _Rows(loss, rows["max"] + log_d, torch.ones_like(loss))


def _to_weighted(rows: dict[str, Tensor], log_d: Tensor, j: int) -> Tensor:
    """sum_i q_ji (lse - z_i)"""
    return rows[f"mass:{j}"] * log_d - rows[f"dot:{j}"]


def _to_all(rows: dict[str, Tensor], log_d: Tensor, total: int | Tensor, j: int) -> Tensor:
    """The mean over the V classes of lse - z_i, weighted by q_j where there are class weights."""
    if "sum" in rows:
        return log_d - rows["sum"] / total
    return _to_weighted(rows, log_d, j) / total


def _statistics(
    z: Tensor, labels: list[Tensor], weights: list[Tensor], with_sum: bool, shard: Shard | None
) -> tuple[dict[str, Tensor], int | Tensor]:
    """Statistics of whole rows by name, and V of them, [N] where they are sharded.

    At most one of the labels. Dynamo traces this, so names are plain text. To that of torch 2.11 a float is
    a symbol, and so is its `bool`, with which no list is multiplied.
    """
    names = ["max", "sumexp"] + ["pick"] * len(labels) + (["sum"] if with_sum else [])
    names += [f"{row}:{j}" for j in range(len(weights)) for row in ("dot", "mass")]
    total: int | Tensor = z.shape[1]
    if shard is None:
        packed = ops.row_stats(z, labels, weights, ",".join(names))
    else:
        packed, total = whole_row_stats(z, labels, weights, ",".join(names), shard)
    return dict(zip(names, packed.unbind(0), strict=True)), total


def _columns_of(weight: Tensor, z: Tensor, shard: Shard | None) -> Tensor:
    """The weights of the classes in `z`."""
    if shard is None:
        return weight
    return weight.index_select(0, shard.start + torch.arange(z.shape[1], device=z.device))


def _valid_or_nan(weights: Tensor) -> Tensor:
    """All NaN if one of them is negative, NaN or infinite."""
    return torch.where(((weights >= 0) & weights.isfinite()).all(), weights, torch.nan)
