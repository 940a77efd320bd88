"""GPT-NeoX: per-token losses times a mask, over its sum.

Source: EleutherAI/gpt-neox, megatron/model/gpt2_model.py
Family: Masks and weights
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    logits = (3 * torch.randn(B, S, V)).half().requires_grad_()
    mask = (torch.arange(S) < torch.tensor([[5], [8]])).float()
    return logits, torch.randint(V, (B, S)), mask


def loss(logits, labels, loss_mask):
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    loss_mask = loss_mask.view(-1)
    return torch.sum(losses.contiguous().view(-1) * loss_mask) / loss_mask.sum()


EXPECTED = """\
[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
