"""Reverse KL to the mean of two teachers: the mixture is weighed by a side that is no part of it.

Source: none; what turning the divergence of an ensemble round gives
Family: Each entry
"""

import torch
import torch.nn.functional as F

N, V = 12, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), *(torch.randn(N, V, requires_grad=True) for _ in range(2))


def loss(logits, first, second):
    log_p = F.log_softmax(logits, dim=-1)
    log_q = (0.5 * (F.softmax(first, dim=-1) + F.softmax(second, dim=-1))).log()
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


EXPECTED = """\
sum p*(log p - log(0.5*q + 0.5*r))
row_stats: max,sumexp
sharded: left as written
"""
