"""Cut Cross-Entropy, its plain definition: linear, soft-cap, loss, squared normaliser.

Source: apple/ml-cross-entropy, cut_cross_entropy/utils.py
Family: Z-loss
"""

import torch
import torch.nn.functional as F

B, S, D, V = 2, 9, 4, 64


def inputs():
    targets = torch.randint(V, (B, S))
    targets[1, 4:] = -100
    return torch.randn(B, S, D).requires_grad_(), torch.randn(V, D).requires_grad_(), targets


def loss(e, c, targets, softcap=20.0):
    e, targets = e[:, :-1].flatten(0, -2), targets[:, 1:].flatten()
    logits = torch.tanh((e @ c.T) / softcap) * softcap
    lse = torch.logsumexp(logits, dim=-1)
    counted = targets != -100
    z_loss = torch.where(counted, lse.pow(2), 0.0).sum() / counted.count_nonzero()
    return F.cross_entropy(logits.float(), targets) + 0.1 * z_loss


EXPECTED = """\
lse
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
