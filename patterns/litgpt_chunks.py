"""LitGPT: chunks of rows, their losses glued together and summed over the tokens that count.

Source: Lightning-AI/litgpt, litgpt/utils.py
Family: Autocast, checkpoints, chunks
"""

import torch
import torch.nn.functional as F

B, S, V, CHUNK = 2, 9, 64, 7


def inputs():
    targets = torch.randint(V, (B, S))
    targets[0, :4] = -100
    return torch.randn(B, S, V).bfloat16().requires_grad_(), targets


def loss(logits, targets, ignore_index=-100):
    logits, targets = logits.reshape(-1, logits.size(-1)), targets.reshape(-1)
    losses = [
        F.cross_entropy(z, y, ignore_index=ignore_index, reduction="none")
        for z, y in zip(logits.split(CHUNK), targets.split(CHUNK))
    ]
    counted = (targets != ignore_index).sum()
    return torch.cat(losses).sum() / counted.maximum(torch.ones_like(counted))


EXPECTED = """\
[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
