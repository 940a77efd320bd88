"""MixCo: the log of softmax against mixed targets, summed and averaged.

Source: sungnyun/MixCo-Mixup-Contrastive, simclr/loss/mix_loss.py
Family: Soft targets
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    mixed = torch.zeros(N, V)
    rows, share = torch.arange(N), torch.rand(N)
    mixed[rows, rows] = share
    mixed[rows, (rows + 1) % N] = 1 - share
    return (2 * torch.randn(N, V)).requires_grad_(), mixed


def loss(logits, target):
    probs = F.softmax(logits, 1)
    return (-target * torch.log(probs)).sum(1).mean()


EXPECTED = """\
dot(q) - lse*mass(q)
row_stats: max,sumexp,dot:0,mass:0
sharded: all_gather [4, N]
"""
