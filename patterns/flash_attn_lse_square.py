"""flash-attn: logits scaled and smoothed, the squared normaliser filled with 0 where a row is ignored.

Source: Dao-AILab/flash-attention, tests/losses/test_cross_entropy.py
Family: Z-loss
"""

import torch
import torch.nn.functional as F

N, V = 16, 64


def inputs():
    labels = torch.randint(V, (N,))
    labels[::4] = -100
    return (2 * torch.randn(N, V)).bfloat16().requires_grad_(), labels


def loss(logits, labels, logit_scale=0.7, smoothing=0.1, lse_square_scale=1e-2):
    scaled = logits.float() * logit_scale
    losses = F.cross_entropy(scaled, labels, label_smoothing=smoothing, reduction="none")
    z_losses = lse_square_scale * torch.logsumexp(scaled, dim=-1) ** 2
    z_losses = z_losses.masked_fill(labels == -100, 0.0)
    return losses + z_losses, z_losses


EXPECTED = """\
[y != -100](lse - 0.9*pick(y) - 0.1*sum/V)
lse
row_stats: max,sumexp,pick,sum
sharded: all_gather [4, N]
"""
