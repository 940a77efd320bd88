"""MiniCPM: the hidden states divided before the head, the logits upcast after it.

Source: OpenBMB/MiniCPM, model/modeling_minicpm.py
Family: Soft-cap, scale, bias
"""

import torch
from torch import nn

B, S, D, V = 2, 8, 4, 64


def inputs():
    h = torch.randn(B, S, D, dtype=torch.bfloat16).requires_grad_()
    return h, torch.randn(V, D, dtype=torch.bfloat16).requires_grad_(), torch.randint(V, (B, S))


def loss(hidden_states, weight, labels, dim_model_base=2):
    logits = nn.functional.linear(hidden_states / (D / dim_model_base), weight)
    logits = logits.float()
    shift_logits = logits[..., :-1, :].contiguous().view(-1, V)
    return nn.CrossEntropyLoss()(shift_logits, labels[..., 1:].contiguous().view(-1))


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
