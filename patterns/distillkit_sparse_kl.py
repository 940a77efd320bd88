"""DistillKit: sparse teacher logits at a temperature, the student's at their ids less its logsumexp.

Source: arcee-ai/DistillKit, distillkit/lossfuncs/common.py and kl.py
Family: KL divergence
"""

import torch

B, S, V, K, T = 2, 6, 128, 32, 2.0
OPTIONS = {"min_vocab": 33}  # no loss of V classes is what normalises the teacher's k


def inputs():
    ids = torch.rand(B, S, V).argsort(-1)[..., :K]
    mask = (torch.arange(S)[None, :] >= 2).expand(B, S).float()
    return torch.randn(B, S, V, requires_grad=True), ids, 3 * torch.randn(B, S, K), mask


def loss(student_logits, target_ids, target_logits, mask):
    z = student_logits / T
    lse = torch.logsumexp(z.to(torch.float32), dim=-1, keepdim=True).to(z.dtype)
    log_q = z.gather(-1, target_ids) - lse
    scaled = target_logits / T
    log_p = scaled - torch.logsumexp(scaled, dim=-1, keepdim=True)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return T**2 * (kl * mask).sum() / mask.sum()


EXPECTED = """\
pick(y[32]) - lse
row_stats: max,sumexp,picks*32
sharded: all_gather [34, N]
"""
