"""alpha-zero-general: cross entropy of the policy head to search probabilities, summed over the batch.

Source: suragnair/alpha-zero-general, othello/pytorch/NNet.py
Family: Soft targets
"""

import torch
import torch.nn.functional as F

N, V = 16, 65


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.rand(N, V).softmax(1)


def loss(scores, pi):
    log_policy = F.log_softmax(scores, dim=1)
    return -torch.sum(pi * log_policy) / pi.size()[0]


EXPECTED = """\
sum(dot(q) - lse*mass(q))
row_stats: max,sumexp,dot:0,mass:0
sharded: all_gather [4, N]
"""
