"""Soft embeddings: probabilities with an epsilon in the logarithm, and their mean embedding as well.

Source: none named; text generators with a discriminator, and training without teacher forcing
Family: Kept beside
"""

import torch
import torch.nn.functional as F

N, D, V = 12, 8, 60


def inputs():
    tensors = torch.randn(N, D), torch.randn(V, D)
    return *(t.requires_grad_() for t in tensors), torch.randint(V, (N,))


def loss(hidden, embedding, tokens, eps=1e-10):
    probs = F.softmax(F.linear(hidden, embedding), dim=-1)
    soft = probs @ embedding
    return F.nll_loss(torch.log(probs + eps), tokens), soft


EXPECTED = """\
mean[y != -100](1e-10 + exp(pick(y) - lse))
kept: softmax of all classes [12x60], read by matmul (soft = probs @ embedding)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
