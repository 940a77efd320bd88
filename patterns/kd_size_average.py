"""Distillation with the arguments that torch has deprecated: size_average and reduce.

Source: peterliht/knowledge-distillation-pytorch and others of its time
Family: KL divergence
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randn(N, V), torch.randint(V, (N,))


def loss(outputs, teacher_outputs, labels, T=4.0, alpha=0.9):
    log_p, q = F.log_softmax(outputs / T, dim=1), F.softmax(teacher_outputs / T, dim=1)
    divergence = F.kl_div(log_p, q, size_average=False) / labels.shape[0]
    per_sample = F.cross_entropy(outputs, labels, reduce=False)
    return alpha * T * T * divergence + (1 - alpha) * per_sample.mean()


EXPECTED = """\
sum(sum q*(log q - log p), targets constant)
row_stats: max,sumexp
sharded: as a loss of one side
[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
