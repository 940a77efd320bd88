"""Evaluation: the log-probabilities are returned and no gradient is wanted.

Source: none; a step of validation
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return (2 * torch.randn(N, V)), torch.ones((), requires_grad=True), torch.randint(V, (N,))


def loss(logits, scale, labels):
    log_probs = F.log_softmax(logits, dim=-1)
    return F.nll_loss(log_probs, labels) * scale, log_probs


EXPECTED = """\
LOGITS_ESCAPE: The log_softmax of all classes [16x48] is returned, so it is in memory anyway.
    Compute the loss from the logits, apart from the log-probabilities that you keep.
"""
