"""TinyLlama in pure bfloat16: nothing is upcast, the loss comes back in 16 bits.

Source: jzhang38/TinyLlama, lit_gpt/utils.py
Family: Autocast, checkpoints, chunks
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    return torch.randn(B, S, V).bfloat16().requires_grad_(), torch.randint(V, (B, S))


def loss(logits, targets):
    logits = logits.reshape(-1, logits.size(-1))
    return F.cross_entropy(logits, targets.reshape(-1), ignore_index=-1)


EXPECTED = """\
mean[y != -1](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
