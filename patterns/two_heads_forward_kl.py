"""DistillKit: a frozen teacher's head beside the student's, forward KL over a temperature, padding masked.

Source: arcee-ai/DistillKit, distil_logits.py
Family: KL divergence
"""

import torch
import torch.nn.functional as F

N, V, D, E = 16, 64, 8, 12


def inputs():
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    mask = (torch.arange(N) % 4 > 0).float()
    return hidden, weight, torch.randn(N, E), torch.randn(V, E), mask


def loss(hidden, weight, teacher_hidden, teacher_weight, mask, temperature=2.0):
    with torch.no_grad():
        teacher_logits = F.linear(teacher_hidden, teacher_weight)
        target = F.softmax(teacher_logits / temperature, dim=-1)
    student_logits = F.linear(hidden, weight)
    logprobs = F.log_softmax(student_logits / temperature, dim=-1)
    kl = F.kl_div(logprobs, target, reduction="none").sum(-1)
    return temperature**2 * (kl * mask).sum() / mask.sum()


EXPECTED = """\
lse*mass(q) + mass(q2) - dot(q)
row_stats: max,sumexp,dot:0,mass:0
sharded: all_gather [4, N]
"""
