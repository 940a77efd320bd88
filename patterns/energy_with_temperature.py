"""Free energy: minus a temperature times the logsumexp of logits over it.

Source: wetliu/energy_ood, CIFAR/test.py, and denmalbas007/clinc150-ood-detection, src/methods/energy.py
Family: Normalisers
"""

import torch
import torch.nn.functional as F

N, D, V = 16, 12, 48


def inputs():
    return torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)


def loss(features, weight, temperature=2.0):
    return -temperature * torch.logsumexp(F.linear(features, weight) / temperature, dim=-1)


EXPECTED = """\
-2*lse
row_stats: max,sumexp
sharded: all_gather [2, N]
"""
