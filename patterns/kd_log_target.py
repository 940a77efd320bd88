"""TRL, GKD with beta 0: kl_div to log-probabilities of a teacher, padding indexed away by a mask.

Source: huggingface/trl, trl/experimental/gkd/gkd_trainer.py
Family: KL divergence
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    labels = torch.randint(V, (B, S))
    labels[:, :3] = -100
    return torch.randn(B, S, V, requires_grad=True), torch.randn(B, S, V), labels


def loss(student_logits, teacher_logits, labels, temperature=0.9):
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    mask = labels != -100
    return (divergence * mask).sum() / mask.sum()


EXPECTED = """\
sum q*(log q - log p), targets constant
row_stats: max,sumexp
sharded: as a loss of one side
"""
