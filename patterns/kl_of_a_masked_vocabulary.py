"""Masked vocabulary: products of which a mask leaves entries out, whatever the logits are there.

Source: a form of jongwooko/distillm, distillm/losses.py, with the mask of a shared vocabulary
Family: KL divergence
"""

import math

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    logits, shared = torch.randn(N, V), torch.rand(N, V) > 0.5
    logits[:, -5:], shared[:, -5:] = -math.inf, False
    return logits.requires_grad_(), torch.randn(N, V), shared


def loss(logits, teacher_logits, shared):
    products = F.softmax(teacher_logits, -1) * F.log_softmax(logits, -1)
    return -products.masked_fill(~shared, 0).sum(-1).mean()


EXPECTED = """\
sum where(t, 0, q*log p), targets constant
row_stats: max,sumexp
sharded: as a loss of one side
"""
