"""transformers: summed, divided by a count that all ranks have added up, a tensor.

Source: huggingface/transformers, src/transformers/trainer.py
Family: Masks and weights
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    logits = (3 * torch.randn(B, S, V)).requires_grad_()
    labels = torch.randint(V, (B, S))
    labels[:, -2:] = -100
    return logits, labels, torch.tensor(37)


def loss(logits, labels, num_items_in_batch):
    total = F.cross_entropy(logits.view(-1, V), labels.view(-1), reduction="sum")
    return total / num_items_in_batch.to(total.device) * 4


EXPECTED = """\
sum[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
