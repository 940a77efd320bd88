"""TRL: picked logits minus a logsumexp taken row by row, stacked, under a temperature.

Source: huggingface/trl, trl/trainer/utils.py
Family: Policy gradients
"""

import torch

B, S, V = 2, 8, 64


def inputs():
    return torch.randn(B, S, V, requires_grad=True), torch.randint(V, (B, S))


def loss(logits, completion_ids, temperature=0.9):
    logits = logits / temperature
    picked = torch.gather(logits, dim=-1, index=completion_ids.unsqueeze(-1)).squeeze(-1)
    normaliser = torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    return picked - normaliser


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
