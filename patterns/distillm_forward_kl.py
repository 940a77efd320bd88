"""DistiLLM: cross entropy to the teacher's softmax in float32, over the tokens that count.

Source: jongwooko/distillm, distillm/losses.py
Family: KL divergence
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    labels = torch.randint(V, (B, S))
    labels[0, :3] = -100
    return torch.randn(B, S, V).bfloat16().requires_grad_(), torch.randn(B, S, V).bfloat16(), labels


def loss(logits, teacher_logits, labels):
    teacher_probs = F.softmax(teacher_logits, dim=-1, dtype=torch.float32)
    student_logprobs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    x = (teacher_probs * student_logprobs).sum(dim=-1).view(-1)
    mask = (labels != -100).int().view(-1)
    return -(x * mask).sum(dim=0) / mask.sum(dim=0)


EXPECTED = """\
sum q*log p, targets constant
row_stats: max,sumexp
sharded: as a loss of one side
"""
