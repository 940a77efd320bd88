"""Focal loss: (1 - exp(-ce)) ** gamma times the cross entropy, with its gradient through both.

Source: AdeelH/pytorch-multi-class-focal-loss, focal_loss.py
Family: Focal and poly
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    labels = torch.randint(V, (N,))
    labels[3] = -100
    return (2 * torch.randn(N, V)).requires_grad_(), labels


def loss(logits, labels, gamma=2.0):
    ce = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    pt = torch.exp(-ce)
    return (0.25 * (1 - pt) ** gamma * ce).mean()


EXPECTED = """\
[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
