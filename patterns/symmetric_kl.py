"""SMART-like: a symmetric KL of two passes, from the difference of their log-probabilities, both learn.

Source: in the manner of namisan/mt-dnn, mt_dnn/loss.py
Family: Several sides
"""

import torch
import torch.nn.functional as F

N, V = 12, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randn(N, V, requires_grad=True)


def loss(logits, noised):
    log_p, log_q = F.log_softmax(logits, dim=-1), F.log_softmax(noised, dim=-1)
    gap = log_p - log_q
    return ((log_p.exp() - log_q.exp()) * gap).sum(-1).mean()


EXPECTED = """\
sum p*(log p - log q) + q*(log q - log p)
row_stats: max,sumexp
sharded: left as written
"""
