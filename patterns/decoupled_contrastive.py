"""Decoupled contrastive learning: the positive is lowered by 103 in the normaliser alone.

Source: raminnakhli/Decoupled-Contrastive-Learning, loss/dcl.py
Family: Contrastive
"""

import math

import torch
import torch.nn.functional as F

N, D = 24, 12
SMALL = math.log(1e-45)


def inputs():
    return torch.randn(N, D, requires_grad=True), torch.randn(N, D, requires_grad=True)


def loss(first, second, temperature=0.1):
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    logits = first @ second.t() / temperature
    labels = torch.arange(N, device=logits.device)
    positive = logits.gather(1, labels[:, None]).squeeze(1)
    negative = torch.logsumexp(logits + SMALL * F.one_hot(labels, N), dim=1)
    return (negative - positive).mean()


EXPECTED = """\
pick(y)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
lse
row_stats: max,sumexp
sharded: all_gather [2, N]
"""
