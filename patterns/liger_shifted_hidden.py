"""Liger Kernel, its plain definition: the hidden states are shifted, then the head.

Source: linkedin/Liger-Kernel, src/liger_kernel/transformers/model/loss_utils.py
Family: Heads
"""

import torch
import torch.nn.functional as F

B, S, D, V = 2, 9, 4, 64


def inputs():
    h = torch.randn(B, S, D, dtype=torch.bfloat16).requires_grad_()
    return h, torch.randn(V, D, dtype=torch.bfloat16).requires_grad_(), torch.randint(V, (B, S))


def loss(hidden_states, lm_head_weight, labels):
    shift_hidden = hidden_states[..., :-1, :].contiguous().view(-1, D)
    shift_labels = labels[..., 1:].contiguous().view(-1)
    logits = shift_hidden @ lm_head_weight.t()
    return F.cross_entropy(logits.float(), shift_labels, reduction="mean")


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
