"""MLX: the score scaled down, the mean logit taken off, the normaliser added last.

Source: ml-explore/mlx, python/mlx/nn/losses.py
Family: Label smoothing
"""

import torch

B, S, V = 2, 8, 64


def inputs():
    return (3 * torch.randn(B, S, V)).requires_grad_(), torch.randint(V, (B, S)), torch.rand(B, S)


def loss(logits, targets, weights, label_smoothing=0.1):
    score = torch.take_along_dim(logits, targets.unsqueeze(-1), -1).squeeze(-1)
    lse = torch.logsumexp(logits, dim=-1)
    smoothed = -logits.mean(dim=-1) * label_smoothing
    return (weights * (lse - (1 - label_smoothing) * score + smoothed)).mean()


EXPECTED = """\
lse - 0.9*pick(y) - 0.1*sum/V
row_stats: max,sumexp,pick,sum
sharded: all_gather [4, N]
"""
