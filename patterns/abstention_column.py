"""Abstention: a learnt score for none of the classes, put behind the logits; its column is a label too.

Source: thulas/dac-label-noise, dac_loss.py, and rejection by a class more
Family: Cross entropy
"""

import torch
import torch.nn.functional as F

N, D, V = 16, 12, 47


def inputs():
    return (
        torch.randn(N, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        torch.randn(N, 1, requires_grad=True),
        torch.randint(V + 1, (N,)),
    )


def loss(hidden, weight, none_of_them, labels):
    logits = torch.cat([F.linear(hidden, weight), none_of_them], dim=-1)
    return F.cross_entropy(logits, labels)


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
