"""Medusa: the logits of all heads, stacked by the model, and a loss of each over the tokens that it is for.

Source: FasterDecoding/Medusa, medusa/model/medusa_model_legacy.py and medusa/train/train_legacy.py
Family: Several losses
"""

import torch
import torch.nn.functional as F
from torch.nn import CrossEntropyLoss

HEADS, B, S, V, D = 3, 2, 9, 64, 8


def inputs():
    labels = torch.randint(V, (B, S))
    labels[:, :2] = -100
    weights = torch.randn(HEADS, V, D, requires_grad=True)
    blocks = torch.randn(HEADS, D, D, requires_grad=True)
    return torch.randn(B, S, D, requires_grad=True), blocks, weights, labels


def loss(hidden_states, blocks, weights, labels):
    medusa_logits = []
    for i in range(HEADS):
        hidden = hidden_states + F.silu(F.linear(hidden_states, blocks[i]))
        medusa_logits.append(F.linear(hidden, weights[i]))
    logits = torch.stack(medusa_logits, dim=0).float()
    total, loss_fct = 0, CrossEntropyLoss()
    for i in range(HEADS):
        head_logits = logits[i, :, : -(2 + i)].contiguous().view(-1, logits.shape[-1])
        head_labels = labels[..., 2 + i :].contiguous().view(-1)
        total += loss_fct(head_logits, head_labels)
    return total


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
