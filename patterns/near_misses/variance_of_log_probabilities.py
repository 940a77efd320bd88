"""Varentropy: the second moment of log-probabilities under their softmax, which is no power of either.

Source: xjdr-alt/entropix, entropix/torch_sampler.py
Family: Look-alikes
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
LOGITS_ESCAPE: The log_softmax of all classes [16x48] is also used by sum (varentropy =
    torch.sum(probs * (log_probs / math.log(2) + entropy[..., None]) ** 2, dim=-1)). Compute the loss
    from the logits, apart from the log-probabilities that you keep.
"""
