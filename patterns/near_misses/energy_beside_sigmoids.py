"""A slip: a normaliser alone whose logits another loss reads as well, which has all of them in memory.

Source: none; an energy beside sigmoids of the same logits
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, D, V = 16, 12, 48


def inputs():
    weights = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return *weights, (torch.rand(N, V) < 0.1).float()


def loss(hidden, weight, targets):
    logits = F.linear(hidden, weight)
    energy = -torch.logsumexp(logits, dim=-1)
    return F.binary_cross_entropy_with_logits(logits, targets) + 0.1 * energy.mean()


EXPECTED = """\
NOT_UNDERSTOOD: The result of logsumexp goes into mean (return
    F.binary_cross_entropy_with_logits(logits, targets) + 0.1 * energy.mean()). If this is a cross
    entropy, write this step in one of the spellings that the README lists; if not, it runs as written.
"""
