"""Draft models: the teacher's top k by numpy's indexing, and all other classes as one more, their mass.

Source: none; as of the draft models that speculative decoding trains on cached logits
Family: KL divergence
"""

import torch
import torch.nn.functional as F

N, D, V, K = 12, 8, 64, 20


def inputs():
    ids = torch.rand(N, V).argsort(-1)[:, :K]
    p = torch.randn(N, V).softmax(-1).gather(-1, ids)
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return hidden, weight, ids, p


def loss(hidden, weight, ids, p):
    log_q = F.log_softmax(F.linear(hidden, weight), dim=-1)[torch.arange(N)[:, None], ids]
    tail, drafted = 1 - p.sum(-1), 1 - log_q.exp().sum(-1)
    kl = (p * (p.log() - log_q)).sum(-1) + tail * (tail.log() - drafted.clamp(min=1e-6).log())
    return kl.mean()


EXPECTED = """\
pick(y[20]) - lse
row_stats: max,sumexp,picks*20
sharded: all_gather [22, N]
"""
