"""Conjugate pseudo-labels: a Tsallis entropy of order 1.5 at a temperature, for adaptation at test time.

Source: none named; Tsallis entropy of predictions in test-time adaptation
Family: Entropy and accuracy
"""

import torch

N, V = 16, 48


def inputs():
    return ((2 * torch.randn(N, V)).requires_grad_(),)


def tsallis_entropy(predictions, alpha=1.5):
    return 1 / (alpha - 1) * (1 - torch.sum(predictions**alpha, dim=-1))


def loss(outputs, temp=0.8):
    outputs = outputs / temp
    predictions = torch.softmax(outputs, dim=1)
    return tsallis_entropy(predictions).mean()


EXPECTED = """\
2 - 2*exp(lse(1.5) - 1.5*lse)
row_stats: max,sumexp,sumexp^1.5
sharded: all_gather [3, N]
"""
