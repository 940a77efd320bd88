"""LitGPT: summed, over the number of tokens that count but at least one.

Source: Lightning-AI/litgpt, litgpt/utils.py
Family: Cross entropy
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 9, 64


def inputs():
    logits = (3 * torch.randn(B, S, V)).bfloat16().requires_grad_()
    targets = torch.randint(V, (B, S))
    targets[0, :4] = -100
    return logits, targets


def loss(logits, targets, ignore_index=-100):
    logits, targets = logits.reshape(-1, logits.size(-1)), targets.reshape(-1)
    per_token = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    counted = (targets != ignore_index).sum()
    return per_token.sum() / counted.maximum(torch.ones_like(counted))


EXPECTED = """\
[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
