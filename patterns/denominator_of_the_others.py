"""Additive margin by hand: exponentials of all classes but the label's, which scatter sets to 0, in the sum.

Source: none named; the angular losses that speaker and face recognition write out
Family: Contrastive
"""

import torch
import torch.nn.functional as F

N, D, SPEAKERS = 12, 16, 48


def inputs():
    tensors = torch.randn(N, D), torch.randn(SPEAKERS, D)
    return *(t.requires_grad_() for t in tensors), torch.randint(SPEAKERS, (N,))


def loss(embeddings, weight, speakers, s=30.0, m=0.2):
    scores = s * F.linear(F.normalize(embeddings), F.normalize(weight))
    own = scores.gather(1, speakers.unsqueeze(1)).squeeze(1) - s * m
    others = torch.exp(scores).scatter(1, speakers.unsqueeze(1), 0.0).sum(dim=1)
    return -(own - torch.log(torch.exp(own) + others)).mean()


EXPECTED = """\
pick(y) - 6
mean_p(k)*exp(lse)
row_stats: max,sumexp,pick,mass:0,expdot:0
sharded: all_gather [5, N]
"""
