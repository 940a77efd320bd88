"""Focal loss: nll of log-probabilities weighted by class, the picked one indexed by a range, a real exponent.

Source: AdeelH/pytorch-multi-class-focal-loss, focal_loss.py
Family: Focal and poly
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return (2 * torch.randn(N, V)).requires_grad_(), torch.randint(V, (N,)), torch.rand(V) + 0.5


def loss(x, y, alpha, gamma=1.5):
    log_p = F.log_softmax(x, dim=-1)
    ce = F.nll_loss(log_p, y, weight=alpha, reduction="none")
    log_pt = log_p[torch.arange(len(x)), y]
    pt = log_pt.exp()
    return ((1 - pt) ** gamma * ce).mean()


EXPECTED = """\
[y != -100](lse*w[y] - w[y]*pick(y))
pick(y2) - lse
row_stats: max,sumexp,pick,pick
sharded: all_gather [4, N]
"""
