"""Megatron-LM: max, exp, sum and log by hand, the picked logit masked where another rank would have it.

Source: NVIDIA/Megatron-LM, megatron/core/tensor_parallel/cross_entropy.py
Family: By hand
"""

import torch

S, B, V = 8, 2, 64


def inputs():
    return (3 * torch.randn(S, B, V)).bfloat16().requires_grad_(), torch.randint(V, (S, B))


def loss(logits, target, first=0, last=V):
    logits = logits.float()
    logits = logits - logits.detach().max(dim=-1)[0].unsqueeze(-1)
    elsewhere = (target < first) | (target >= last)
    masked_target = (target - first).masked_fill(elsewhere, 0).view(-1)
    flat = logits.view(-1, V)
    picked = flat[torch.arange(flat.size(0)), masked_target].view_as(target)
    picked = picked.masked_fill(elsewhere, 0.0)
    return torch.log(logits.exp().sum(dim=-1)) - picked


EXPECTED = """\
pick(y) - max
lse - max
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
