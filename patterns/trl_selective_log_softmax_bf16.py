"""TRL: log_softmax sequence by sequence for 16-bit logits, gathered, stacked.

Source: huggingface/trl, trl/trainer/utils.py
Family: Policy gradients
"""

import torch
import torch.nn.functional as F

B, S, V = 3, 6, 64


def inputs():
    return torch.randn(B, S, V).bfloat16().requires_grad_(), torch.randint(V, (B, S))


def loss(logits, index):
    per_token = []
    for row, row_index in zip(logits, index):
        row_logps = F.log_softmax(row, dim=-1)
        per_token.append(row_logps.gather(dim=-1, index=row_index.unsqueeze(-1)).squeeze(-1))
    return torch.stack(per_token)


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
