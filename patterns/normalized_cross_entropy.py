"""Active-passive losses: nll over the sum of all classes' nll, and one minus the label's probability.

Source: HanxunH/Active-Passive-Losses, loss.py
Family: Focal and poly
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))


def loss(pred, labels, alpha=1.0, beta=1.0):
    one_hot = F.one_hot(labels, V).float()
    log_pred = F.log_softmax(pred, dim=1)
    nce = -1 * torch.sum(one_hot * log_pred, dim=1) / (-log_pred.sum(dim=1))
    mae = 1.0 - torch.sum(one_hot * F.softmax(pred, dim=1), dim=1)
    return alpha * nce.mean() + beta * mae.mean()


EXPECTED = """\
lse - pick(y)
V*lse - sum
1 - exp(pick(y) - lse)
row_stats: max,sumexp,pick,sum
sharded: all_gather [4, N]
"""
