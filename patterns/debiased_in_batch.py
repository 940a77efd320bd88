"""Debiased contrastive loss in a batch: exponentials, the positives among them filled with 0, then summed.

Source: joshr17/HCL and chingyaoc/DCL, with the pairs of one batch
Family: Contrastive
"""

import math

import torch
import torch.nn.functional as F

N, D = 24, 12


def inputs():
    return torch.randn(N, D, requires_grad=True), torch.randn(N, D, requires_grad=True)


def loss(first, second, temperature=0.5, tau_plus=0.1):
    first, second = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
    same = torch.eye(N, dtype=torch.bool, device=first.device)
    neg = torch.exp(first @ second.t() / temperature).masked_fill(same, 0).sum(-1)
    pos = torch.exp((first * second).sum(-1) / temperature)
    ng = (-tau_plus * (N - 1) * pos + neg) / (1 - tau_plus)
    ng = torch.clamp(ng, min=(N - 1) * math.e ** (-1 / temperature))
    return -torch.log(pos / (pos + ng)).mean()


EXPECTED = """\
mean_p(k)*exp(lse)
row_stats: max,sumexp,mass:0,expdot:0
sharded: all_gather [4, N]
"""
