"""transformers: next-token cross entropy, upcast, labels shifted by padding.

Source: huggingface/transformers, src/transformers/loss/loss_utils.py
Family: Causal shift
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    logits = torch.randn(B, S, V, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(V, (B, S))
    labels[:, :2] = -100
    return logits, labels


def loss(logits, labels):
    logits = logits.float()
    labels = F.pad(labels, (0, 1), value=-100)
    shifted = labels[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, V), shifted.view(-1), ignore_index=-100, reduction="mean")


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
