"""DistiLLM: reverse KL with a teacher, both sets of logits from their heads, tokens weighted.

Source: jongwooko/distillm, distillm/losses.py
Family: KL divergence
"""

import torch

B, S, V, D, E = 2, 8, 64, 8, 12


def inputs():
    hidden, weight = torch.randn(B, S, D).bfloat16(), torch.randn(V, D).bfloat16()
    teacher = torch.randn(B, S, E).bfloat16(), torch.randn(V, E).bfloat16()
    return hidden.requires_grad_(), weight.requires_grad_(), *teacher, torch.rand(B, S)


def loss(hidden, weight, teacher_hidden, teacher_weight, token_mask):
    student = torch.log_softmax((hidden @ weight.t()).to(torch.float32), dim=-1)
    teacher = torch.log_softmax((teacher_hidden @ teacher_weight.t()).to(torch.float32).detach(), dim=-1)
    per_token = torch.sum(student.exp() * (student - teacher), dim=-1)
    return (per_token * token_mask).sum() / token_mask.sum().clamp(min=1.0)


EXPECTED = """\
mean_p - lse - mean_p(q)
row_stats: max,sumexp,sumexpz,expdot:0
sharded: all_gather [4, N]
"""
