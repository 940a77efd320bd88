"""Reverse KL to the mean of two teachers: the mixture is weighed by a side that is no part of it.

Source: none; what turning the divergence of an ensemble round gives
Family: Look-alikes
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
MIXTURE: It sums logarithms over the classes that are weighed by no probabilities, or one of a
    mixture of probabilities that is weighed by others than those that are in it. No statistic of one
    row or of the other stands for it, so it runs as written.
MIXTURE: It sums logarithms over the classes that are weighed by no probabilities, or one of a
    mixture of probabilities that is weighed by others than those that are in it. No statistic of one
    row or of the other stands for it, so it runs as written.
"""
