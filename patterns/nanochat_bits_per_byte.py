"""nanochat: bits per byte, labels made safe for a table of byte counts.

Source: karpathy/nanochat, nanochat/loss_eval.py
Family: Masks and weights
"""

import math

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    logits = (3 * torch.randn(B, S, V)).requires_grad_()
    labels = torch.randint(V, (B, S))
    labels[1, 5:] = -1
    token_bytes = torch.arange(V) % 7
    return logits, labels, token_bytes


def loss(logits, labels, token_bytes):
    nats = F.cross_entropy(logits.view(-1, V), labels.view(-1), ignore_index=-1, reduction="none")
    labels = labels.view(-1)
    valid = labels >= 0
    size = torch.where(valid, token_bytes[torch.where(valid, labels, 0)], 0)
    return (nats * (size > 0)).sum() / (math.log(2) * size.sum())


EXPECTED = """\
[y != -1](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
