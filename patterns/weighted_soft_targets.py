"""PyTorch documentation: cross_entropy to class probabilities, with class weights and smoothing.

Source: pytorch/pytorch, torch/nn/functional.py
Family: Soft targets
"""

import torch
import torch.nn.functional as F

B, C, S = 3, 48, 5


def inputs():
    target = torch.randn(B, C, S).softmax(dim=1)
    return torch.randn(B, C, S, requires_grad=True), target, torch.rand(C) + 0.5


def loss(input, target, weight):
    rows = F.cross_entropy(input, target, weight=weight, reduction="none", label_smoothing=0.1)
    return rows.mean(), F.cross_entropy(input, target, weight=weight)


EXPECTED = """\
(0.1*lse*mass(w)/V + 0.9*lse*mass(q, w) - 0.1*dot(w)/V - 0.9*dot(q, w))
mean(lse*mass(q, w) - dot(q, w))
row_stats: max,sumexp,dot:0,mass:0,dot:1
sharded: all_gather [5, N]
"""
