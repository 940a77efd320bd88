"""DistiLLM: total variation between two softmaxes, over the tokens that count.

Source: jongwooko/distillm, distillm/losses.py
Family: Each entry
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    labels = torch.randint(V, (N,))
    labels[::5] = -100
    return (2 * torch.randn(N, V)).requires_grad_(), 2 * torch.randn(N, V), labels


def loss(logits, teacher_logits, labels):
    teacher = F.softmax(teacher_logits, dim=-1)
    student = F.softmax(logits, dim=-1)
    mask = (labels != -100).int()
    distance = 0.5 * torch.abs(teacher - student).sum(dim=-1)
    return (distance * mask).sum() / mask.sum()


EXPECTED = """\
sum abs(q - p)
row_stats: max,sumexp
sharded: left as written
"""
