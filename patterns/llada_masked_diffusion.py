"""LLaDA: masked tokens alone, each over the probability of its mask.

Source: ML-GSAI/LLaDA, GUIDELINES.md
Family: Masks and weights
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    logits = (3 * torch.randn(B, S, V)).bfloat16().requires_grad_()
    p_mask = (0.25 + 0.7 * torch.rand(B, 1)).expand(B, S)
    return logits, torch.randint(V, (B, S)), torch.rand(B, S) < 0.6, p_mask


def loss(logits, input_ids, masked, p_mask):
    token_loss = F.cross_entropy(logits.permute(0, 2, 1), input_ids, reduction="none") / p_mask
    return torch.where(masked, token_loss, torch.zeros_like(token_loss)).sum() / (B * S)


EXPECTED = """\
[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
