"""DCL: the sum over negatives, less what of it are positives, bounded from below.

Source: chingyaoc/DCL, main.py, with a queue of negatives
Family: Contrastive
"""

import math

import torch
import torch.nn.functional as F

B, D, N = 16, 12, 48


def inputs():
    return torch.randn(B, D, requires_grad=True), torch.randn(B, D), torch.randn(N, D)


def loss(out_1, out_2, queue, temperature=0.5, tau_plus=0.1):
    out_1, out_2, queue = (F.normalize(x, dim=-1) for x in (out_1, out_2, queue))
    neg = torch.exp(torch.mm(out_1, queue.t().contiguous()) / temperature)
    pos = torch.exp(torch.sum(out_1 * out_2, dim=-1) / temperature)
    Ng = (-tau_plus * N * pos + neg.sum(dim=-1)) / (1 - tau_plus)
    Ng = torch.clamp(Ng, min=N * math.e ** (-1 / temperature))
    return (-torch.log(pos / (pos + Ng))).mean()


EXPECTED = """\
exp(lse)
row_stats: max,sumexp
sharded: all_gather [2, N]
"""
