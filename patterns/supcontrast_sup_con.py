"""SupContrast: similarities less their maximum and the log of a sum without the row's own, of positives.

Source: HobbitLong/SupContrast, losses.py
Family: Contrastive
"""

import torch
import torch.nn.functional as F

N, D = 48, 8


def inputs():
    return F.normalize(torch.randn(N, D), dim=1).requires_grad_(), torch.arange(N // 2).repeat(2) // 3


def loss(features, labels, temperature=0.2):
    mask = torch.eq(labels[:, None], labels[None, :]).float()
    similarities = torch.div(torch.matmul(features, features.T), temperature)
    top, _ = torch.max(similarities, dim=1, keepdim=True)
    logits = similarities - top.detach()
    others = torch.scatter(torch.ones_like(mask), 1, torch.arange(N, device=mask.device).view(-1, 1), 0)
    mask = mask * others
    exponentials = torch.exp(logits) * others
    log_prob = logits - torch.log(exponentials.sum(1, keepdim=True))
    positives = mask.sum(1)
    positives = torch.where(positives < 1e-6, 1, positives)
    mean = (mask * log_prob).sum(1) / positives
    return -(temperature / 0.07) * mean.view(2, -1).mean()


EXPECTED = """\
dot(q2) - lse*mass(q2) - mass(q2)*log(mean_p(q))
row_stats: max,sumexp,expdot:0,dot:1,mass:1
sharded: all_gather [5, N]
"""
