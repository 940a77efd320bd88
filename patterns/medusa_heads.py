"""Medusa: a head for each of the next tokens, later heads weigh less, top-1 accuracy of each.

Source: FasterDecoding/Medusa, medusa/train/train_legacy.py
Family: Several losses
"""

import torch
from torch.nn import CrossEntropyLoss

HEADS, B, S, V = 3, 2, 9, 64


def inputs():
    labels = torch.randint(V, (B, S))
    labels[:, :2] = -100
    return torch.randn(HEADS, B, S, V, requires_grad=True), labels


def loss(logits, labels):
    total, correct, loss_fct = 0, [], CrossEntropyLoss()
    for i in range(HEADS):
        head_logits = logits[i, :, : -(2 + i)].contiguous().view(-1, V)
        head_labels = labels[..., 2 + i :].contiguous().view(-1)
        total = total + 0.8**i * loss_fct(head_logits, head_labels)
        counts = head_labels.ne(-100)
        top1 = head_logits.detach().argmax(-1)
        correct.append((top1.eq(head_labels) & counts).sum() / counts.sum())
    return total, torch.stack(correct)


EXPECTED = """\
mean[y != -100](lse - pick(y))
argmax
row_stats: max,sumexp,pick,argmax
sharded: all_gather [4, N]
mean[y != -100](lse - pick(y))
argmax
row_stats: max,sumexp,pick,argmax
sharded: all_gather [4, N]
mean[y != -100](lse - pick(y))
argmax
row_stats: max,sumexp,pick,argmax
sharded: all_gather [4, N]
"""
