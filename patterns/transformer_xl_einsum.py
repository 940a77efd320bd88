"""Transformer-XL: a projected head by one einsum of three, log_softmax and gather.

Source: kimiyoung/transformer-xl, pytorch/utils/proj_adaptive_softmax.py
Family: Heads
"""

import torch
import torch.nn.functional as F

N, D, E, V = 16, 4, 3, 64


def inputs():
    hidden, proj = torch.randn(N, D).requires_grad_(), torch.randn(D, E).requires_grad_()
    weight, bias = torch.randn(V, E).requires_grad_(), torch.randn(V).requires_grad_()
    return hidden, proj, weight, bias, torch.randint(V, (N,))


def loss(hidden, proj, weight, bias, target):
    logit = torch.einsum("bd,de,ev->bv", (hidden, proj, weight.t())) + bias
    return -F.log_softmax(logit, dim=-1).gather(1, target.unsqueeze(1)).squeeze(1)


EXPECTED = """\
lse - pick(y)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
