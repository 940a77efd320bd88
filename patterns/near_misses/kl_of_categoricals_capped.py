"""A slip: torch's divergence of two categoricals, whose infinity somebody has made a number.

Source: none; torch/distributions/kl.py with its infinity replaced
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randn(N, V)


def loss(logits, old_logits):
    log_q, log_p = F.log_softmax(logits, dim=-1), F.log_softmax(old_logits, dim=-1)
    terms = log_p.exp() * (log_p - log_q)
    terms[torch.eq(log_q.exp(), 0)] = 50.0
    terms[log_p.exp() == 0] = 0
    return terms.sum(-1).mean()


EXPECTED = """\
NOT_UNDERSTOOD: The result of log_softmax goes into eq (terms[torch.eq(log_q.exp(), 0)] = 50.0). If
    this is a cross entropy, write this step in one of the spellings that the README lists; if not, it
    runs as written.
"""
