"""PolyLoss: its focal form, by the probability gathered from softmax.

Source: abhuse/polyloss-pytorch, polyloss.py
Family: Focal and poly
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))


def loss(logits, labels, epsilon=1.0, gamma=2.0):
    pt = logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]
    ce = F.cross_entropy(logits, labels, reduction="none")
    focal = (1 - pt) ** gamma * ce
    return (focal + epsilon * torch.pow(1 - pt, gamma + 1)).mean()


EXPECTED = """\
[y != -100](lse - pick(y))
1 - exp(pick(y) - lse)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
