"""TRL, GKD: the generalised Jensen-Shannon divergence from a frozen teacher, by a stack of log-probabilities.

Source: huggingface/trl, trl/experimental/gkd/gkd_trainer.py
Family: Several sides
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    labels = torch.randint(V, (B, S))
    labels[:, :3] = -100
    return torch.randn(B, S, V, requires_grad=True), torch.randn(B, S, V), labels


def loss(student_logits, teacher_logits, labels, beta=0.5, temperature=0.9):
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    weight = torch.tensor(beta, dtype=student.dtype)
    both = torch.stack([student + torch.log1p(-weight), teacher + torch.log(weight)])
    mixture = torch.logsumexp(both, dim=0)
    to_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True)
    to_student = F.kl_div(mixture, student, reduction="none", log_target=True)
    mask = (labels != -100)[..., None]
    return ((weight * to_teacher + (1 - weight) * to_student) * mask).sum() / mask.sum()


EXPECTED = """\
sum(sum 0.5*p*(log p - log m) + 0.5*q*(log q - log m), m = 0.5*p + 0.5*q)
row_stats: max,sumexp
sharded: left as written
"""
