"""TRADES: KL divergence from clean to adversarial, with a gradient to the clean probabilities too.

Source: yaodongyu/TRADES, trades.py
Family: Several sides
"""

import torch
import torch.nn.functional as F

B, V = 8, 48


def inputs():
    adversarial, clean = torch.randn(B, V, requires_grad=True), torch.randn(B, V, requires_grad=True)
    return adversarial, clean, torch.randint(V, (B,))


def loss(adversarial, clean, y, beta=6.0):
    robust = F.kl_div(F.log_softmax(adversarial, dim=1), F.softmax(clean, dim=1), reduction="sum") / B
    return F.cross_entropy(clean, y) + beta * robust


EXPECTED = """\
sum(sum q*(log q - log p))
row_stats: max,sumexp
sharded: left as written
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
