"""Logit standardisation: KL between softmaxes of logits that are standardised over the classes of each row.

Source: sunshangquan/logit-standardization-KD, mdistiller/distillers/KD.py
Family: KL divergence
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), 3 * torch.randn(N, V), torch.randint(V, (N,))


def normalize(logit):
    mean = logit.mean(dim=-1, keepdims=True)
    stdv = logit.std(dim=-1, keepdims=True)
    return (logit - mean) / (1e-7 + stdv)


def loss(student, teacher, target, temperature=2.0):
    log_pred = F.log_softmax(normalize(student) / temperature, dim=1)
    pred_teacher = F.softmax(normalize(teacher) / temperature, dim=1)
    kd = F.kl_div(log_pred, pred_teacher, reduction="none").sum(1).mean() * temperature**2
    return 0.1 * F.cross_entropy(student, target) + 9.0 * kd


EXPECTED = """\
sum q*(log q - log p), targets constant
row_stats: max,sumexp
sharded: as a loss of one side
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
