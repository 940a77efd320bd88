"""Brier score: the squared distance of the probabilities from the one-hot label.

Source: in the manner of Lightning-AI/torchmetrics and of calibration studies; none named
Family: Each entry
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))


def loss(logits, labels):
    probs = F.softmax(logits, dim=-1)
    return (probs - F.one_hot(labels, V).float()).pow(2).sum(dim=-1).mean()


EXPECTED = """\
sum (p - t)^2
row_stats: max,sumexp
sharded: left as written
"""
