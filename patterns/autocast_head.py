"""minGPT under autocast: the head runs in bfloat16, the loss in float32.

Source: karpathy/nanoGPT, train.py
Family: Autocast, checkpoints, chunks
"""

import torch
import torch.nn.functional as F

B, S, V, D = 2, 8, 64, 12


def inputs():
    return (
        torch.randn(B, S, D, requires_grad=True),
        (torch.randn(V, D) / 3).requires_grad_(),
        torch.randint(V, (B, S)),
    )


def loss(x, weight, targets):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = F.linear(x, weight)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


EXPECTED = """\
mean[y != -1](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
