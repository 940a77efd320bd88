"""Varentropy: the variance of log-probabilities under their own softmax, about an entropy with a gradient.

Source: xjdr-alt/entropix, entropix/torch_sampler.py
Family: Each entry
"""

import math

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return ((2 * torch.randn(N, V)).requires_grad_(),)


def loss(logits):
    log_probs = F.log_softmax(logits, dim=-1)
    probs = torch.exp(log_probs)
    entropy = -torch.sum(probs * log_probs, dim=-1) / math.log(2)
    varentropy = torch.sum(probs * (log_probs / math.log(2) + entropy[..., None]) ** 2, dim=-1)
    return (entropy + 0.1 * varentropy).mean()


EXPECTED = """\
1.4426950408889634*lse - 1.4426950408889634*mean_p
sum p*(1.443*log p + n)^2
row_stats: max,sumexp,sumexpz
sharded: left as written
"""
