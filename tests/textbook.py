"""The arguments of `inductor_ce.cross_entropy` by their textbook formulas, for any dtype.

Nothing here shares code with inductor_ce, nor with torch's own cross entropy.
"""

from __future__ import annotations

import torch
from reference import log_sum_exp
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss_weight: float | Tensor = 0.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    num_label_tokens: float | Tensor | None = None,
) -> Tensor:
    """-sum_i w_i q_i log p_i + w lse², q the smoothed target, over the rows that count."""
    z = logits.to(dtype)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    classes = z.shape[-1]
    by_class = torch.ones(classes, dtype=dtype) if weight is None else weight.to(dtype)
    counts = torch.ones(z.shape[:-1], dtype=torch.bool) if mask is None else mask != 0
    share = torch.ones(z.shape[:-1], dtype=dtype)
    if target.is_floating_point():
        q = target.to(dtype)
    else:
        y = target.long()
        counts = counts & (y != ignore_index)
        q = (torch.arange(classes) == y.unsqueeze(-1)).to(dtype)
        share = (q * by_class).sum(-1)
    q = (1 - label_smoothing) * q + label_smoothing / classes
    lse = log_sum_exp(z)
    terms = torch.where(q == 0, 0.0, by_class * q * (lse.unsqueeze(-1) - z))
    loss = terms.sum(-1) + z_loss_weight * lse.square()
    loss = torch.where(counts, loss, 0.0)
    if reduction == "none":
        return loss
    if num_label_tokens is not None:
        return loss.sum() / num_label_tokens
    return loss.sum() / (share[counts].sum() if reduction == "mean" else 1)
