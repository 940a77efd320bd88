"""Levanter: the normaliser minus the logits summed against a one-hot target, and its square.

Source: stanford-crfm/levanter, src/levanter/models/loss.py
Family: By hand
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    return (3 * torch.randn(B, S, V)).requires_grad_(), torch.randint(V, (B, S)), torch.ones(B, S).triu()


def loss(logits, tokens, mask, log_normalizer_weight=1e-3):
    target = F.one_hot(torch.roll(tokens, -1, dims=1), V).to(logits.dtype)
    log_normalizer = torch.logsumexp(logits, dim=-1)
    losses = log_normalizer - (logits * target).sum(-1)
    losses = losses + log_normalizer_weight * log_normalizer**2
    return (losses * mask).sum() / mask.sum()


EXPECTED = """\
lse
lse - pick(y)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
