"""Distillation by hand: KL to a teacher whose probabilities get a small number inside the logarithm.

Source: none; the form in which many small repositories write it
Family: KL divergence
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randn(N, V), torch.randint(V, (N,))


def loss(student, teacher, labels, T=2.0):
    with torch.no_grad():
        target = F.softmax(teacher / T, dim=-1)
    divergence = target * (torch.log(target + 1e-8) - F.log_softmax(student / T, dim=-1))
    return 0.5 * divergence.sum(-1).mean() * T**2 + 0.5 * F.cross_entropy(student, labels)


EXPECTED = """\
sum q*(log(q + 1e-08) - log p), targets constant
row_stats: max,sumexp
sharded: as a loss of one side
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
