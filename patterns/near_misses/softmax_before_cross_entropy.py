"""A slip: a model that ends in softmax, under a loss that takes logits; the probabilities are its logits.

Source: none; the commonest question of beginners
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return (2 * torch.randn(N, V)).requires_grad_(), torch.randint(V, (N,))


def loss(scores, labels):
    probabilities = F.softmax(scores, dim=1)
    return F.cross_entropy(probabilities, labels)


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
