"""Truncated loss: (1 - p_y ** q) / q against label noise, weighted per sample.

Source: AlanChou/Truncated-Loss, TruncatedLoss.py
Family: Focal and poly
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,)), torch.rand(N, 1)


def loss(logits, targets, weight, q=0.7, k=0.5):
    p = F.softmax(logits, dim=1)
    yg = torch.gather(p, 1, torch.unsqueeze(targets, 1))
    rows = ((1 - (yg**q)) / q) * weight - ((1 - (k**q)) / q) * weight
    return torch.mean(rows)


EXPECTED = """\
exp(pick(y) - lse)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
