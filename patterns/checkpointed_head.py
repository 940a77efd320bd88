"""torch.utils.checkpoint: head and loss inside a checkpoint, computed again in the backward.

Source: pytorch/pytorch, torch/utils/checkpoint.py
Family: Autocast, checkpoints, chunks
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

B, S, V, D = 2, 8, 64, 12


def inputs():
    labels = torch.randint(V, (B, S))
    labels[0, :2] = -100
    return torch.randn(B, S, D, requires_grad=True), (torch.randn(V, D) / 3).requires_grad_(), labels


def head(hidden, weight, labels):
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def loss(hidden, weight, labels):
    return checkpoint(head, hidden, weight, labels, use_reentrant=False) / (labels != -100).sum()


EXPECTED = """\
sum[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
