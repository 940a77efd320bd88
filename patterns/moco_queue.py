"""MoCo: the positive's score in front of those of a queue, label 0.

Source: facebookresearch/moco, moco/builder.py
Family: Contrastive
"""

import torch
import torch.nn.functional as F

N, D, K = 16, 12, 63


def inputs():
    q, k = torch.randn(N, D, requires_grad=True), F.normalize(torch.randn(N, D), dim=1)
    return q, k, F.normalize(torch.randn(D, K), dim=0)


def loss(q, k, queue, T=0.07):
    q = F.normalize(q, dim=1)
    l_pos = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
    l_neg = torch.einsum("nc,ck->nk", [q, queue.clone().detach()])
    logits = torch.cat([l_pos, l_neg], dim=1) / T
    return F.cross_entropy(logits, torch.zeros(N, dtype=torch.long))


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
