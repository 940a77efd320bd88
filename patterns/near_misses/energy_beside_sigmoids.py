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
NORMALISER: The logits of this normaliser are in memory anyway, for binary_cross_entropy_with_logits
    (return F.binary_cross_entropy_with_logits(logits, targets) + 0.1 * energy.mean()). A normaliser
    alone is fused where nothing else needs its logits, so it runs as written.
"""
