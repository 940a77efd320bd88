"""Confidence penalty: the entropy of the prediction taken off the cross entropy.

Source: none; Pereyra et al. 2017, arXiv:1701.06548
Family: Entropy and accuracy
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))


def loss(logits, target, beta=0.1):
    log_p = F.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return F.nll_loss(log_p, target) - beta * entropy.mean()


EXPECTED = """\
lse - mean_p
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick,sumexpz
sharded: all_gather [4, N]
"""
