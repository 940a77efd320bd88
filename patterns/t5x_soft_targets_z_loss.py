"""T5X: dense smoothed targets, their entropy taken off, the square of the normaliser added.

Source: google-research/t5x, t5x/losses.py
Family: Label smoothing
"""

import math

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    return (3 * torch.randn(B, S, V)).requires_grad_(), torch.randint(V, (B, S)), torch.rand(B, S).round()


def cross_entropy_with_logits(logits, targets, z_loss):
    shifted = logits - logits.max(-1, keepdim=True).values.detach()
    log_sum = shifted.exp().sum(-1, keepdim=True).log()
    value = -torch.sum(targets * (shifted - log_sum), -1)
    log_z = (log_sum + logits.detach().amax(-1, keepdim=True)).squeeze(-1)
    return value + z_loss * log_z.square()


def loss(logits, labels, weights, label_smoothing=0.1, z_loss=1e-3):
    confidence = 1.0 - label_smoothing
    low = label_smoothing / (V - 1)
    entropy = -(confidence * math.log(confidence) + (V - 1) * low * math.log(low + 1e-20))
    hot = F.one_hot(labels, V).float()
    soft_targets = hot * confidence + (1 - hot) * low
    value = cross_entropy_with_logits(logits, soft_targets, z_loss) - entropy
    return (value * weights).sum() / weights.sum()


EXPECTED = """\
0.0015873015873015873*V*lse + 0.8984126984126984*lse - 0.8984126984126984*pick(y) -
    0.0015873015873015873*sum
lse
row_stats: max,sumexp,pick,sum
sharded: all_gather [4, N]
"""
