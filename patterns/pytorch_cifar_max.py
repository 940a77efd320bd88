"""pytorch-cifar: the predicted class as the index that max returns, counted beside the loss.

Source: kuangliu/pytorch-cifar, main.py
Family: Entropy and accuracy
"""

import torch
from torch import nn

N, V = 16, 48
criterion = nn.CrossEntropyLoss()


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))


def loss(outputs, targets):
    value = criterion(outputs, targets)
    _, predicted = outputs.max(1)
    return value, predicted.eq(targets).sum()


EXPECTED = """\
mean[y != -100](lse - pick(y))
argmax
row_stats: max,sumexp,pick,argmax
sharded: all_gather [4, N]
"""
