"""Unlikelihood training: nll_loss, and log(1 - p), clamped, of every candidate of the context.

Source: facebookresearch/unlikelihood_training, custom/candidate_penalty_ce_loss.py
Family: Each entry
"""

import torch
import torch.nn.functional as F

N, V, PAD = 16, 48, 1


def inputs():
    return (2 * torch.randn(N, V)).requires_grad_(), torch.randint(2, V, (N,))


def loss(logits, target):
    lprobs = F.log_softmax(logits, dim=-1)
    mle = F.nll_loss(lprobs, target, ignore_index=PAD, reduction="sum")
    context = target.unsqueeze(0).expand(N, N).tril(-1)
    context = context.masked_fill(context == target.unsqueeze(1), PAD)
    negative = torch.zeros_like(lprobs).scatter_(1, context, 1)
    one_minus_probs = torch.clamp(1.0 - lprobs.exp(), min=1e-5)
    return mle + (-torch.log(one_minus_probs) * negative).sum()


EXPECTED = """\
sum[y != 1](lse - pick(y))
sum(sum -log(clamp(1 - p, min=1e-05))*t)
row_stats: max,sumexp,pick
sharded: left as written
"""
