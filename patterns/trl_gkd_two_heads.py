"""TRL, GKD: from the heads of student and frozen teacher, of the answers' positions alone.

Source: huggingface/trl, trl/experimental/gkd/gkd_trainer.py
Family: Several sides
"""

import torch
import torch.nn.functional as F

B, S, P, V, D, E = 2, 9, 3, 64, 8, 12


def inputs():
    labels = torch.randint(V, (B, S))
    labels[:, :5] = -100
    hidden, lm_head = torch.randn(B, S, D).bfloat16(), torch.randn(V, D).bfloat16()
    teacher = torch.randn(B, S, E).bfloat16(), torch.randn(V, E).bfloat16()
    return hidden.requires_grad_(), lm_head.requires_grad_(), *teacher, labels


def loss(hidden, lm_head, teacher_hidden, teacher_lm_head, labels, beta=0.5, temperature=0.9):
    student_logits = F.linear(hidden, lm_head)
    with torch.no_grad():
        teacher_logits = F.linear(teacher_hidden, teacher_lm_head)
    shifted_student_logits = student_logits[:, P - 1 : -1, :]
    shifted_teacher_logits = teacher_logits[:, P - 1 : -1, :]
    shifted_labels = labels[:, P:]
    student_log_probs = F.log_softmax(shifted_student_logits / temperature, dim=-1)
    teacher_log_probs = F.log_softmax(shifted_teacher_logits / temperature, dim=-1)
    beta = torch.tensor(beta, dtype=student_log_probs.dtype)
    mixture_log_probs = torch.logsumexp(
        torch.stack([student_log_probs + torch.log1p(-beta), teacher_log_probs + torch.log(beta)]), dim=0
    )
    kl_teacher = F.kl_div(mixture_log_probs, teacher_log_probs, reduction="none", log_target=True)
    kl_student = F.kl_div(mixture_log_probs, student_log_probs, reduction="none", log_target=True)
    jsd = beta * kl_teacher + (1 - beta) * kl_student
    mask = shifted_labels != -100
    return (jsd * mask.unsqueeze(-1)).sum() / mask.sum()


EXPECTED = """\
sum(sum 0.5*p*(log p - log m) + 0.5*q*(log q - log m), m = 0.5*p + 0.5*q)
row_stats: max,sumexp
sharded: left as written
"""
