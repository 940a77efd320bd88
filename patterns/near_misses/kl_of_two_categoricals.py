"""torch.distributions: the KL of two categoricals, infinite where the other has underflowed to 0.

Source: pytorch/pytorch, torch/distributions/kl.py
Family: Look-alikes
"""

import torch
from torch.distributions import Categorical
from torch.distributions.kl import _kl_categorical_categorical as kl_divergence

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randn(N, V)


def loss(logits, old_logits):
    new, old = (Categorical(logits=z, validate_args=False) for z in (logits, old_logits))
    return kl_divergence(old, new).mean()


EXPECTED = """\
NOT_UNDERSTOOD: The result of logsumexp goes into eq (return kl_divergence(old, new).mean()). If
    this is a cross entropy, write this step in one of the spellings that the README lists; if not, it
    runs as written.
"""
