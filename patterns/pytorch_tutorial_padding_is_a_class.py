"""PyTorch tutorials: sequence first, the padding token is one of the classes.

Source: pytorch/tutorials, beginner_source/translation_transformer.py
Family: Cross entropy
"""

import torch
from torch import nn

S, B, V, PAD = 8, 2, 64, 1
criterion = nn.CrossEntropyLoss(ignore_index=PAD)


def inputs():
    logits = (3 * torch.randn(S, B, V)).requires_grad_()
    target = torch.randint(2, V, (S, B))
    target[6:, 0] = PAD
    return logits, target


def loss(logits, target):
    return criterion(logits.reshape(-1, logits.shape[-1]), target.reshape(-1))


EXPECTED = """\
mean[y != 1](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
