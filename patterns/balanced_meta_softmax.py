"""Balanced softmax: the log of the class counts added to the logits.

Source: jiawei-ren/BalancedMetaSoftmax-Classification, loss/BalancedSoftmaxLoss.py
Family: Class weights
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,)), torch.randint(1, 500, (V,))


def loss(logits, labels, sample_per_class):
    spc = sample_per_class.type_as(logits)
    spc = spc.unsqueeze(0).expand(logits.shape[0], -1)
    return F.cross_entropy(input=logits + spc.log(), target=labels, reduction="mean")


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
