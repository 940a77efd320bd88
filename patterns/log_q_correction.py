"""logQ: the logarithm of how often an item is sampled taken off in the logsumexp alone.

Source: tensorflow/recommenders, layers/loss.py, in torch; the label's score apart, uncorrected
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
    scores = torch.einsum("nd,vd->nv", users, items) - frequency.log()
    positive = torch.einsum("nd,nd->n", users, items[bought])
    return (torch.logsumexp(scores, dim=-1) - positive).mean()


EXPECTED = """\
lse
row_stats: max,sumexp
sharded: all_gather [2, N]
"""
