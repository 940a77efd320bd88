"""Mini-sequence: the hidden states in chunks, each with its own checkpointed head, sums added.

Source: wdlctc/mini-s, minis/mini_sequence.py
Family: Autocast, checkpoints, chunks
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

N, V, D, CHUNKS = 24, 64, 12, 3


def inputs():
    labels = torch.randint(V, (N,))
    labels[::5] = -100
    return torch.randn(N, D, requires_grad=True), (torch.randn(V, D) / 3).requires_grad_(), labels


def chunk_loss(hidden, weight, labels):
    return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")


def loss(hidden, weight, labels):
    total = 0.0
    for piece, piece_labels in zip(hidden.chunk(CHUNKS), labels.chunk(CHUNKS)):
        total = total + checkpoint(chunk_loss, piece, weight, piece_labels, use_reentrant=False)
    return total / (labels != -100).sum()


EXPECTED = """\
sum[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
sum[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
sum[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
