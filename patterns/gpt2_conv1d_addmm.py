"""transformers: Conv1D as the head, that is addmm.

Source: huggingface/transformers, src/transformers/pytorch_utils.py
Family: Heads
"""

import torch
import torch.nn.functional as F

B, S, D, V = 2, 8, 4, 64


def inputs():
    h, weight = torch.randn(B, S, D).requires_grad_(), torch.randn(D, V).requires_grad_()
    return h, weight, torch.randn(V).requires_grad_(), torch.randint(V, (B, S))


def loss(x, weight, bias, labels):
    logits = torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(B, S, V)
    return F.cross_entropy(logits.view(-1, V), labels.view(-1))


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
