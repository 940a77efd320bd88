"""Kornia: the power of 1 - softmax times log_softmax in every class, summed against one-hot labels.

Source: kornia/kornia, kornia/losses/focal.py
Family: Focal and poly
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return (2 * torch.randn(N, V)).requires_grad_(), torch.randint(V, (N,))


def loss(pred, target, alpha=0.25, gamma=2.0):
    soft, log_soft = F.softmax(pred, dim=1), F.log_softmax(pred, dim=1)
    one_hot = F.one_hot(target, V)
    weight = torch.pow(1.0 - soft, gamma)
    focal = -alpha * weight * log_soft
    return torch.sum(one_hot * focal, dim=1).mean()


EXPECTED = """\
0.25*lse + 0.25*lse*exp(2*pick(y) - 2*lse) + 0.5*pick(y)*exp(pick(y) - lse) - 0.25*pick(y) -
    0.25*pick(y)*exp(2*pick(y) - 2*lse) - 0.5*lse*exp(pick(y) - lse)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
