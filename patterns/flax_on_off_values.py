"""Flax examples: on and off values chosen by label == arange(V), the constant taken off.

Source: google/flax, examples/lm1b/train.py and flax/training/common_utils.py
Family: Label smoothing
"""

import math

import torch

B, S, V = 2, 8, 64


def inputs():
    targets = torch.randint(V, (B, S))
    return (3 * torch.randn(B, S, V)).requires_grad_(), targets, (targets > 4).float()


def loss(logits, targets, weights, label_smoothing=0.1):
    confidence = 1.0 - label_smoothing
    low = (1.0 - confidence) / (V - 1)
    constant = -(confidence * math.log(confidence) + (V - 1) * low * math.log(low + 1e-20))
    hit = targets[..., None] == torch.arange(V, device=targets.device)
    soft_targets = torch.where(hit, confidence, low)
    value = -torch.sum(soft_targets * torch.log_softmax(logits, -1), axis=-1) - constant
    return (value * weights).sum(), weights.sum()


EXPECTED = """\
0.0015873015873015869*V*lse + 0.8984126984126984*lse*hit(y) - 0.7393964460306014 -
    0.8984126984126984*pick(y)*hit(y) - 0.0015873015873015869*sum
row_stats: max,sumexp,pick,sum
sharded: all_gather [4, N]
"""
