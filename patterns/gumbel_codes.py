"""Gumbel VQ: a code chosen straight through with noise, and the KL of the softmax without, with an epsilon.

Source: karpathy/deep-vector-quantization, dvq/model/quantize.py
Family: Each entry
"""

import torch
import torch.nn.functional as F

N, V, D = 16, 48, 12


def inputs():
    noise = -torch.log(-torch.log(torch.rand(N, V)))
    return torch.randn(N, V, requires_grad=True), torch.randn(V, D, requires_grad=True), noise


def loss(logits, codebook, noise, tau=0.9):
    soft = F.softmax((logits + noise) / tau, dim=1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    chosen = (hard - soft.detach() + soft) @ codebook
    q = F.softmax(logits, dim=1)
    diff = 5e-4 * (q * torch.log(q * V + 1e-10)).sum(dim=1).mean()
    return chosen.square().mean() + diff


EXPECTED = """\
sum p*log(48*p + 1e-10)
row_stats: max,sumexp
sharded: left as written
"""
