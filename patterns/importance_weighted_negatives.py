"""Sampled softmax: each negative's exponential weighed by how seldom it is drawn.

Source: none named; sampled softmax with importance weights, as in retrieval by two towers
Family: Normalisers
"""

import torch

N, D, V = 16, 12, 48


def inputs():
    frequency = torch.rand(V) + 0.1
    return (
        torch.randn(N, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        frequency / frequency.sum(),
        torch.randint(V, (N,)),
    )


def loss(users, items, frequency, bought):
    scores = users @ items.t()
    weights = 1.0 / (V * frequency)
    normaliser = torch.log((weights * torch.exp(scores)).sum(dim=-1))
    return (normaliser - (users * items[bought]).sum(-1)).mean()


EXPECTED = """\
log(mean_p(w)) + lse
row_stats: max,sumexp,expdot:0
sharded: all_gather [3, N]
"""
