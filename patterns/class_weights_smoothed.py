"""PyTorch documentation: class weights, smoothing and ignored rows at once, summed and averaged.

Source: pytorch/pytorch, torch/nn/modules/loss.py
Family: Class weights
"""

import torch
from torch import nn

N, V = 16, 48


def inputs():
    labels = torch.randint(V, (N,))
    labels[::4] = 3
    return torch.randn(N, V, requires_grad=True), labels, torch.rand(V) + 0.5


def loss(logits, labels, weight):
    averaged = nn.CrossEntropyLoss(weight=weight, ignore_index=3, label_smoothing=0.1)(logits, labels)
    return averaged, nn.CrossEntropyLoss(weight=weight, reduction="sum")(logits, labels)


EXPECTED = """\
mean[y != 3](0.1*lse*mass(w)/V + 0.9*lse*w[y] - 0.1*dot(w)/V - 0.9*w[y]*pick(y))
sum[y != -100](lse*w[y] - w[y]*pick(y))
row_stats: max,sumexp,pick,dot:0
sharded: all_gather [4, N]
"""
