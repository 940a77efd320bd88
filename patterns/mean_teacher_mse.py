"""Mean teacher: the squared distance between two softmaxes, and the cross entropy of what is labelled.

Source: CuriousAI/mean-teacher, pytorch/mean_teacher/losses.py
Family: Each entry
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randn(N, V), torch.randint(V, (N,))


def loss(student, teacher, labels):
    p, q = F.softmax(student, dim=1), F.softmax(teacher, dim=1)
    consistency = F.mse_loss(p, q.detach(), reduction="sum") / student.size(0)
    return F.cross_entropy(student, labels, ignore_index=-1) + 10.0 * consistency


EXPECTED = """\
mean[y != -1](lse - pick(y))
sum(sum (p - q)^2)
row_stats: max,sumexp,pick
sharded: left as written
"""
