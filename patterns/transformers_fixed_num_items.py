"""transformers: summed over micro-batches, divided by a count that the trainer passes as an int.

Source: huggingface/transformers, src/transformers/loss/loss_utils.py
Family: Masks and weights
"""

import torch
from torch import nn

N, V = 16, 64


def inputs():
    logits = (3 * torch.randn(N, V)).bfloat16().requires_grad_()
    labels = torch.randint(V, (N,))
    labels[:3] = -100
    return logits, labels, 53


def loss(logits, labels, num_items_in_batch=None):
    reduction = "mean" if num_items_in_batch is None else "sum"
    value = nn.functional.cross_entropy(
        logits.float(), labels.to(logits.device), ignore_index=-100, reduction=reduction
    )
    if reduction == "sum":
        value = value / num_items_in_batch
    return value


EXPECTED = """\
sum[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
