"""Optax: the normaliser minus the logit that take_along_dim picks.

Source: google-deepmind/optax, optax/losses/_classification.py
Family: By hand
"""

import torch

B, S, V = 2, 8, 64


def inputs():
    return (3 * torch.randn(B, S, V)).requires_grad_(), torch.randint(V, (B, S))


def loss(logits, labels):
    shifted = logits - logits.detach().amax(-1, keepdim=True)
    label_logits = torch.take_along_dim(shifted, labels.unsqueeze(-1), dim=-1)[..., 0]
    return shifted.exp().sum(-1).log() - label_logits


EXPECTED = """\
lse - pick(y)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
