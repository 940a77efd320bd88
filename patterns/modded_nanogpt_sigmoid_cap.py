"""modded-nanogpt: a cap by sigmoid, labels of 32 bits, summed.

Source: KellerJordan/modded-nanogpt, train_gpt.py
Family: Soft-cap, scale, bias
"""

import math

import torch
import torch.nn.functional as F

S, D, V = 16, 4, 64


def inputs():
    x = torch.randn(1, S, D, dtype=torch.bfloat16).requires_grad_()
    weight = (10 * torch.randn(V, D)).bfloat16().requires_grad_()
    return x, weight, torch.randint(V, (S,), dtype=torch.int32)


def loss(x, weight, target_seq):
    logits = F.linear(x, weight).float()
    logits = 30 * torch.sigmoid(logits / (7.5 * math.sqrt(x.size(-1))))
    return F.cross_entropy(logits.view(-1, logits.size(-1)), target_seq.long(), reduction="sum")


EXPECTED = """\
sum[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
