"""Reverse KL on the student's own top k: topk gives the values, which no gather picks.

Source: none; a slip away from distillation on the teacher's ids
Family: Look-alikes
"""

import torch

N, V, K = 16, 48, 20


def inputs():
    return 2 * torch.randn(N, V, requires_grad=True), 2 * torch.randn(N, V)


def loss(student_logits, teacher_logits):
    log_q, ids = student_logits.log_softmax(-1).topk(K, dim=-1)
    log_p = teacher_logits.log_softmax(-1).gather(-1, ids)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


EXPECTED = """\
pick(y[20]) - lse
row_stats: max,sumexp,picks*20
sharded: all_gather [22, N]
NOT_UNDERSTOOD: The result of log_softmax goes into topk (log_q, ids =
    student_logits.log_softmax(-1).topk(K, dim=-1)). If this is a cross entropy, write this step in one
    of the spellings that the README lists; if not, it runs as written.
"""
