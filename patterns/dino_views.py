"""DINO: centred and sharpened teacher against every other view of the student.

Source: facebookresearch/dino, main_dino.py
Family: Soft targets
"""

import torch
import torch.nn.functional as F

B, V, CROPS = 8, 64, 3


def inputs():
    student = torch.randn(CROPS * B, V, requires_grad=True)
    return student, torch.randn(2 * B, V), torch.randn(1, V)


def loss(student_output, teacher_output, center, student_temp=0.1, teacher_temp=0.04):
    student_out = (student_output / student_temp).chunk(CROPS)
    teacher_out = F.softmax((teacher_output - center) / teacher_temp, dim=-1).detach().chunk(2)
    total, terms = 0, 0
    for iq, q in enumerate(teacher_out):
        for v in range(len(student_out)):
            if v == iq:
                continue
            total = total + torch.sum(-q * F.log_softmax(student_out[v], dim=-1), dim=-1).mean()
            terms += 1
    return total / terms


EXPECTED = """\
sum -q*log p, targets constant
row_stats: max,sumexp
sharded: as a loss of one side
sum -p*log q, targets constant
sum -q*log p, targets constant
row_stats: max,sumexp
sharded: as a loss of one side
sum -q*log p, targets constant
row_stats: max,sumexp
sharded: as a loss of one side
"""
