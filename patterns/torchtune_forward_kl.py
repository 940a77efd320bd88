"""torchtune: forward KL without its constant, -inf logits of the student masked out, over tokens that count.

Source: pytorch/torchtune, torchtune/modules/loss/kd_losses.py
Family: KL divergence
"""

import math

import torch
import torch.nn.functional as F

N, V = 16, 64


def inputs():
    labels = torch.randint(V, (N,))
    labels[::5] = -100
    student = torch.randn(N, V).bfloat16()
    student[:, V - 5 :] = -math.inf  # padding of the vocabulary
    return student.requires_grad_(), torch.randn(N, V).bfloat16(), labels


def loss(student_logits, teacher_logits, labels):
    teacher_prob = F.softmax(teacher_logits, dim=-1, dtype=torch.float32)
    inf_mask = torch.isinf(student_logits)
    student_logprob = F.log_softmax(student_logits, dim=-1, dtype=torch.float32)
    products = torch.masked_fill(teacher_prob * student_logprob, inf_mask, 0)
    x = torch.sum(products, dim=-1).view(-1)
    mask = (labels != -100).int()
    return -torch.sum(x * mask.view(-1), dim=0) / torch.sum(mask.view(-1), dim=0)


EXPECTED = """\
sum where(t, 0, q*log p), targets constant
row_stats: max,sumexp
sharded: as a loss of one side
"""
