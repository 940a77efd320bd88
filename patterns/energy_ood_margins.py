"""Energy-based OOD: the energy of what is known below one margin, that of outliers above another.

Source: wetliu/energy_ood, CIFAR/train.py
Family: Normalisers
"""

import torch
import torch.nn.functional as F

N, D, V = 16, 12, 48


def inputs():
    return (
        torch.randn(N, D, requires_grad=True),
        torch.randn(N, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
    )


def loss(known, outliers, weight, m_in=-25.0, m_out=-3.0):
    Ec_out = -torch.logsumexp(F.linear(outliers, weight), dim=1)
    Ec_in = -torch.logsumexp(F.linear(known, weight), dim=1)
    return 0.1 * (torch.pow(F.relu(Ec_in - m_in), 2).mean() + torch.pow(F.relu(m_out - Ec_out), 2).mean())


EXPECTED = """\
25 - lse
row_stats: max,sumexp
sharded: all_gather [2, N]
lse - 3
row_stats: max,sumexp
sharded: all_gather [2, N]
"""
