"""Deep mutual learning: a Jensen-Shannon divergence of two models that both learn, by logaddexp.

Source: in the manner of KaiyangZhou/deep-person-reid, projects/DML/dml.py, with a Jensen-Shannon divergence
Family: Several sides
"""

import math

import torch
import torch.nn.functional as F

N, V = 12, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randn(N, V, requires_grad=True)


def loss(logits1, logits2):
    log_p, log_q = F.log_softmax(logits1, dim=1), F.log_softmax(logits2, dim=1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    js = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return 0.5 * js.sum(1).mean()


EXPECTED = """\
sum p*(log p - log m) + q*(log q - log m), m = 0.5*p + 0.5*q
row_stats: max,sumexp
sharded: left as written
"""
