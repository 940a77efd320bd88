"""torchtune: hidden states and the head's weight in, float32 logits, the sum over the tokens that count.

Source: pytorch/torchtune, torchtune/modules/loss/cross_entropy_loss.py
Family: Heads
"""

import torch
import torch.nn.functional as F

B, S, D, V = 2, 8, 4, 64


def inputs():
    targets = torch.randint(V, (B, S))
    targets[1, :3] = -100
    h = torch.randn(B, S, D, dtype=torch.bfloat16).requires_grad_()
    return torch.randn(V, D, dtype=torch.bfloat16).requires_grad_(), h, targets


def loss(weight, outputs, targets, ignore_index=-100):
    total = (targets != ignore_index).sum()
    h, t = outputs.reshape(-1, outputs.size(-1)), targets.reshape(-1)
    logits = F.linear(h, weight)
    return F.cross_entropy(logits.float(), t, reduction="sum", ignore_index=ignore_index) / total


EXPECTED = """\
sum[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
