"""InfoNCE by hand: the positive joins the queue's logsumexp by logaddexp, and is taken off.

Source: none named; the loss of moco in the habit of JAX's
Family: Contrastive
"""

import torch
import torch.nn.functional as F

N, D, K = 16, 12, 48


def inputs():
    return torch.randn(N, D, requires_grad=True), torch.randn(N, D), torch.randn(K, D)


def loss(q, k, queue, T=0.2):
    q, k, queue = F.normalize(q, dim=-1), F.normalize(k, dim=-1), F.normalize(queue, dim=-1)
    positive = (q * k).sum(-1) / T
    negatives = torch.logsumexp(q @ queue.t() / T, dim=-1)
    return (torch.logaddexp(positive, negatives) - positive).mean()


EXPECTED = """\
lse
row_stats: max,sumexp
sharded: all_gather [2, N]
"""
