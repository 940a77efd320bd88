"""DistiLLM: reverse KL of products that are subtracted in place, infinite logits of either side masked out.

Source: jongwooko/distillm, distillm/losses.py
Family: KL divergence
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    no_pad = torch.rand(B, S) > 0.2
    no_pad[0, 0] = True
    return torch.randn(B, S, V, requires_grad=True), torch.randn(B, S, V), no_pad.int()


def loss(logits, teacher_logits, no_pad):
    student_probs = F.softmax(logits, dim=-1, dtype=torch.float32)
    student_logprobs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    teacher_logprobs = F.log_softmax(teacher_logits, dim=-1, dtype=torch.float32)
    inf_mask = torch.isinf(teacher_logits) | torch.isinf(logits)
    prods = torch.masked_fill(student_probs * teacher_logprobs, inf_mask, 0)
    prods -= torch.masked_fill(student_probs * student_logprobs, inf_mask, 0)
    x = torch.sum(prods, dim=-1).view(-1)
    return -torch.sum(x * no_pad.view(-1), dim=0) / torch.sum(no_pad.view(-1), dim=0)


EXPECTED = """\
sum where(t, 0, p*log q) - where(t, 0, p*log p), targets constant
row_stats: max,sumexp
sharded: as a loss of one side
"""
