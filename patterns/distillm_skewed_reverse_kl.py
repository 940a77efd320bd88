"""DistiLLM: skewed reverse KL, whose products are subtracted in place, with infinite logits filled by 0.

Source: jongwooko/distillm, distillm/losses.py
Family: Each entry
"""

import torch
import torch.nn.functional as F

N, V = 12, 48


def inputs():
    labels = torch.randint(V, (N,))
    labels[::3] = -100
    return torch.randn(N, V, requires_grad=True), torch.randn(N, V), labels


def loss(logits, teacher_logits, labels, lam=0.1):
    teacher_probs = F.softmax(teacher_logits, dim=-1, dtype=torch.float32)
    student_probs = F.softmax(logits, dim=-1, dtype=torch.float32)
    mixed_probs = (1 - lam) * teacher_probs + lam * student_probs
    student_logprobs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    mixed_logprobs = torch.log(mixed_probs)
    mask = (labels >= 0).int()
    inf_mask = torch.isinf(logits) | torch.isinf(teacher_logits)
    prod_probs = torch.masked_fill(student_probs * mixed_logprobs, inf_mask, 0)
    prod_probs -= torch.masked_fill(student_probs * student_logprobs, inf_mask, 0)
    x = torch.sum(prod_probs, dim=-1).view(-1)
    return -torch.sum(x * mask.view(-1), dim=0) / torch.sum(mask.view(-1), dim=0)


EXPECTED = """\
sum where(t, 0, p*log(0.1*p + 0.9*q)) - where(t, 0, p*log p)
row_stats: max,sumexp
sharded: left as written
"""
