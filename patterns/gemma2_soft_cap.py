"""transformers, Gemma 2: divided, tanh, multiplied, each step into the same name, then upcast.

Source: huggingface/transformers, src/transformers/models/gemma2/modeling_gemma2.py
Family: Soft-cap, scale, bias
"""

import torch
from torch import nn

B, S, D, V = 2, 8, 4, 64


def inputs():
    h = torch.randn(B, S, D, dtype=torch.bfloat16).requires_grad_()
    weight = (10 * torch.randn(V, D)).bfloat16().requires_grad_()
    return h, weight, torch.randint(V, (B, S))


def loss(hidden_states, weight, labels, cap=30.0):
    logits = nn.functional.linear(hidden_states, weight)
    logits = logits / cap
    logits = torch.tanh(logits)
    logits = logits * cap
    logits = logits.float().view(-1, V)
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    return nn.functional.cross_entropy(logits, shifted, ignore_index=-100)


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
