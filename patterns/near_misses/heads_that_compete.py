"""Heads whose logits are stacked, and normalised over the heads: of no class are there log-probabilities.

Source: none; a gate between experts, written as a loss of each head
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

HEADS, N, V, D = 3, 8, 48, 8


def inputs():
    weights = torch.randn(HEADS, V, D, requires_grad=True)
    return torch.randn(N, D, requires_grad=True), weights, torch.randint(V, (N,))


def loss(hidden, weights, labels):
    logits = torch.stack([F.linear(hidden, weights[i]) for i in range(HEADS)])
    shares = logits.log_softmax(0)
    return -sum(shares[i].gather(1, labels[:, None]).mean() for i in range(HEADS))


EXPECTED = """\
pick(0) - lse
pick(1) - lse
pick(2) - lse
row_stats: max,sumexp,pick,pick,pick
sharded: all_gather [5, N]
"""
