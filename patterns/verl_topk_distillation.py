"""verl: log-probabilities gathered at the teacher's top k ids, clamped, in a KL divergence over these.

Source: volcengine/verl, verl/trainer/distillation/fsdp/losses.py
Family: KL divergence
"""

import math

import torch
import torch.nn.functional as F

B, S, V, K = 2, 6, 64, 24


def inputs():
    ids = torch.rand(B, S, V).argsort(-1)[..., :K]
    log_p = torch.randn(B, S, V).log_softmax(-1).gather(-1, ids)
    return torch.randn(B, S, V, requires_grad=True), ids, log_p, torch.arange(S).expand(B, S) > 1


def loss(logits, teacher_ids, teacher_log_p, response_mask):
    log_q = F.log_softmax(logits, dim=-1).gather(dim=-1, index=teacher_ids)
    least = math.log(1e-8)
    log_p, log_q = teacher_log_p.clamp(min=least), log_q.clamp(min=least)
    kld = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    return (kld * response_mask).sum() / response_mask.sum()


EXPECTED = """\
pick(y[24]) - lse
row_stats: max,sumexp,picks*24
sharded: all_gather [26, N]
"""
