"""Mixup: a convex combination of the losses to two labels of the same logits.

Source: facebookresearch/mixup-cifar10, train.py
Family: Soft targets
"""

import torch
from torch import nn

N, V = 16, 48
criterion = nn.CrossEntropyLoss()


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,)), torch.randperm(N), torch.rand(())


def loss(pred, y, index, lam):
    y_a, y_b = y, y[index]
    mixed = lam * criterion(pred, y_a) + (1 - lam) * criterion(pred, y_b)
    _, predicted = torch.max(pred.detach(), 1)
    correct = lam * predicted.eq(y_a).sum().float() + (1 - lam) * predicted.eq(y_b).sum().float()
    return mixed, correct


EXPECTED = """\
mean[y != -100](lse - pick(y))
mean[y2 != -100](lse - pick(y2))
argmax
row_stats: max,sumexp,pick,pick,argmax
sharded: all_gather [5, N]
"""
