"""TRL, GKD with beta between 0 and 1: the generalised Jensen-Shannon divergence from a frozen teacher.

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
MIXTURE: The result of log_softmax goes into logsumexp (mixture = torch.logsumexp(both, dim=0)),
    where the log of a mixture of probabilities, such as that of a Jensen-Shannon divergence, is taken.
    No statistic of one row or of the other stands for it, so it runs as written.
MIXTURE: The result of log_softmax goes into logsumexp (mixture = torch.logsumexp(both, dim=0)),
    where the log of a mixture of probabilities, such as that of a Jensen-Shannon divergence, is taken.
    No statistic of one row or of the other stands for it, so it runs as written.
NOT_UNDERSTOOD: The result of logsumexp goes into kl_div (to_teacher = F.kl_div(mixture, teacher,
    reduction="none", log_target=True)). It joins values of different logits. If this is a cross
    entropy, write this step in one of the spellings that the README lists; if not, it runs as written.
"""
