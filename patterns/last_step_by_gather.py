"""Packed sequences: the last step of each sequence gathered by an index that is expanded over the classes.

Source: none named; an idiom for the last time step of batched sequences
Family: Rows chosen after
"""

import torch
import torch.nn as nn

B, S, D, V = 6, 7, 8, 48


def inputs():
    lengths = torch.randint(1, S + 1, (B,))
    tensors = torch.randn(B, S, D), torch.randn(V, D)
    return *(t.requires_grad_() for t in tensors), lengths, torch.randint(V, (B,))


def loss(output, weight, lengths, target):
    log_probs = nn.functional.linear(output, weight).log_softmax(dim=-1)
    idx = (lengths - 1).view(-1, 1).expand(len(lengths), log_probs.size(2))
    last = log_probs.gather(1, idx.unsqueeze(1)).squeeze(1)
    return nn.NLLLoss()(last, target)


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
