"""nanochat: columns that pad the vocabulary cut off, upcast, soft-capped.

Source: karpathy/nanochat, nanochat/gpt.py
Family: Soft-cap, scale, bias
"""

import torch
import torch.nn.functional as F

B, S, D, V, PADDED = 2, 8, 4, 61, 64


def inputs():
    targets = torch.randint(V, (B, S))
    targets[0, 6:] = -1
    x = torch.randn(B, S, D, dtype=torch.bfloat16).requires_grad_()
    return x, (4 * torch.randn(PADDED, D)).bfloat16().requires_grad_(), targets


def loss(x, weight, targets, softcap=15):
    logits = F.linear(x, weight)
    logits = logits[..., :V]
    logits = logits.float()
    logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.view(-1, V), targets.view(-1), ignore_index=-1, reduction="mean")


EXPECTED = """\
mean[y != -1](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
