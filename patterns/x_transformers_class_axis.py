"""x-transformers: the classes moved to axis 1.

Source: lucidrains/x-transformers, x_transformers/autoregressive_wrapper.py
Family: Cross entropy
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    logits = (3 * torch.randn(B, S, V)).requires_grad_()
    target = torch.randint(V, (B, S))
    target[:, 6:] = 0
    return logits, target


def loss(logits, target):
    return F.cross_entropy(logits.transpose(1, 2), target, ignore_index=0)


EXPECTED = """\
mean[y != 0](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
