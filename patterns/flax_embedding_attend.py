"""Flax examples: the embedding attended to by einsum, over the square root of its width.

Source: google/flax, examples/lm1b/models.py
Family: Heads
"""

import torch
import torch.nn.functional as F

B, S, D, V = 2, 8, 4, 64


def inputs():
    return torch.randn(B, S, D).requires_grad_(), torch.randn(V, D).requires_grad_(), torch.randint(V, (B, S))


def loss(y, embedding, labels):
    logits = torch.einsum("bsd,vd->bsv", y, embedding)
    logits = logits / y.shape[-1] ** 0.5
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
