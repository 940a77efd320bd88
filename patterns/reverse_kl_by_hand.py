"""MiniLLM: reverse KL to a teacher, the student's softmax times the difference of log-probabilities.

Source: microsoft/LMOps, minillm/finetune.py
Family: KL divergence
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    return torch.randn(B, S, V, requires_grad=True), torch.randn(B, S, V)


def loss(student_logits, teacher_logits):
    with torch.no_grad():
        teacher = F.log_softmax(teacher_logits, dim=-1)
    student = F.log_softmax(student_logits, dim=-1)
    return (student.exp() * (student - teacher)).sum(-1).mean()


EXPECTED = """\
sum p*(log p - log q), targets constant
row_stats: max,sumexp
sharded: as a loss of one side
"""
