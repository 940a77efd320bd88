"""A logged spread: how the log-probabilities vary under their own softmax, detached when all is computed.

Source: in the manner of volcengine/verl, verl/utils/torch_functional.py
Family: Kept beside
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))


def loss(logits, labels):
    log_probs = F.log_softmax(logits, dim=-1)
    spread = (log_probs.exp() * log_probs.square()).sum(-1)
    return F.nll_loss(log_probs, labels), spread.mean().detach()


EXPECTED = """\
mean[y != -100](lse - pick(y))
sum p*(log p)^2
row_stats: max,sumexp,pick
sharded: left as written
"""
