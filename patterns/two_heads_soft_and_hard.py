"""Liger: the labels' cross entropy and the divergence from a teacher's head, mixed, over flattened tokens.

Source: linkedin/Liger-Kernel, src/liger_kernel/chunked_loss/fused_linear_distillation.py
Family: KL divergence
"""

import torch
import torch.nn.functional as F

N, V, D, E = 16, 64, 8, 12


def inputs():
    labels = torch.randint(V, (N,))
    labels[::5] = -100
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return hidden, weight, torch.randn(N, E), torch.randn(V, E), torch.randn(V), labels


def loss(hidden, weight, teacher_input, teacher_weight, teacher_bias, target, hard=0.3, soft=0.7):
    student_logits = (hidden @ weight.t()).float()
    with torch.no_grad():
        teacher_logits = (teacher_input @ teacher_weight.t() + teacher_bias).float()
    ce = F.nll_loss(F.log_softmax(student_logits, -1), target, reduction="sum", ignore_index=-100)
    ce = ce / (target != -100).sum()
    teacher_log_probs = F.log_softmax(teacher_logits, -1)
    student_log_probs = F.log_softmax(student_logits, -1)
    kd = F.kl_div(student_log_probs, teacher_log_probs, reduction="sum", log_target=True) / target.numel()
    return hard * ce + soft * kd


EXPECTED = """\
sum[y != -100](lse - pick(y))
sum(lse*mass(q2) + mass(q, q2) - dot(q2))
row_stats: max,sumexp,pick,dot:0,mass:0
sharded: all_gather [5, N]
"""
