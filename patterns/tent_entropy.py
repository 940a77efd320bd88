"""TENT: the entropy of the softmax as the only loss, softmax times log_softmax.

Source: DequanWang/tent, tent.py
Family: Entropy and accuracy
"""

import torch

N, V = 16, 48


def inputs():
    return (torch.randn(N, V, requires_grad=True),)


def softmax_entropy(x):
    return -(x.softmax(1) * x.log_softmax(1)).sum(1)


def loss(outputs):
    return softmax_entropy(outputs).mean(0)


EXPECTED = """\
lse - mean_p
row_stats: max,sumexp,sumexpz
sharded: all_gather [3, N]
"""
