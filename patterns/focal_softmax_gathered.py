"""Focal loss: the softmax gathered at the label, and the log of that.

Source: none; a common tutorial spelling
Family: Focal and poly
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return (2 * torch.randn(N, V)).requires_grad_(), torch.randint(V, (N,))


def loss(logits, target, gamma=2):
    probs = F.softmax(logits, dim=-1)
    pt = probs.gather(1, target.unsqueeze(1)).squeeze(1)
    return -((1 - pt).pow(gamma) * pt.log()).mean()


EXPECTED = """\
1 - exp(pick(y) - lse)
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
