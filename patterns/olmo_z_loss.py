"""OLMo: cross entropy and z-loss, each summed over the tokens that count, over their number.

Source: allenai/OLMo, olmo/train.py
Family: Z-loss
"""

import torch
import torch.nn.functional as F

N, V = 16, 64


def inputs():
    logits = (2 * torch.randn(N, V)).requires_grad_()
    labels = torch.randint(V, (N,))
    labels[::5] = -100
    return logits, labels, 1e-4


def loss(logits, labels, z_weight):
    ce = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    mask = labels != -100
    z_loss = z_weight * (logits.logsumexp(-1).pow(2) * mask).sum()
    count = mask.sum()
    return ce / count, z_loss / count


EXPECTED = """\
sum[y != -100](lse - pick(y))
lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
