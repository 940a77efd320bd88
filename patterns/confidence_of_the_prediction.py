"""Calibration: the mean confidence of the predictions drawn to their accuracy, beside the cross entropy.

Source: the loss "difference between confidence and accuracy" of Liang et al., 2020, as its formula reads
Family: Entropy and accuracy
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return (2 * torch.randn(N, V)).requires_grad_(), torch.randint(V, (N,))


def loss(logits, labels, beta=1.0):
    conf, pred = torch.softmax(logits, dim=1).max(1)
    acc = (pred == labels).float().mean()
    return F.cross_entropy(logits, labels) + beta * (acc - conf.mean()).abs()


EXPECTED = """\
exp(top - lse)
argmax
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick,argmax,top
sharded: all_gather [5, N]
"""
