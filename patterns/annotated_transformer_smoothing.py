"""The Annotated Transformer: a smoothed distribution, written over a copy of the log-probabilities.

Source: harvardnlp/annotated-transformer, the_annotated_transformer.py
Family: Label smoothing
"""

import torch
from torch import nn

N, V, D, PAD = 16, 64, 8, 0


def inputs():
    target = torch.randint(1, V, (N,))
    target[::5] = PAD
    hidden = torch.randn(N, D, requires_grad=True)
    return hidden, torch.randn(V, D, requires_grad=True), target


def loss(hidden, weight, target, smoothing=0.1):
    x = (hidden @ weight.t()).log_softmax(-1)
    true_dist = x.data.clone()
    true_dist.fill_(smoothing / (V - 2))
    true_dist.scatter_(1, target.data.unsqueeze(1), 1.0 - smoothing)
    true_dist[:, PAD] = 0
    true_dist.masked_fill_((target == PAD).unsqueeze(1), 0.0)
    return nn.KLDivLoss(reduction="sum")(x, true_dist.clone().detach()) / (target != PAD).sum()


EXPECTED = """\
sum(lse*mass(q) + mass(q2) - dot(q))
row_stats: max,sumexp,dot:0,mass:0
sharded: all_gather [4, N]
"""
