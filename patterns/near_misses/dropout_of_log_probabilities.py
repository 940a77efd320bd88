"""A slip: dropout after the normaliser, so that the log-probabilities sum to no distribution.

Source: none; what a refactoring leaves behind
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return (2 * torch.randn(N, V)).requires_grad_(), torch.randint(V, (N,))


def loss(logits, labels):
    log_probs = F.log_softmax(logits, dim=-1)
    return F.nll_loss(F.dropout(log_probs, 0.3, training=True), labels)


EXPECTED = """\
NOT_UNDERSTOOD: The result of log_softmax goes into dropout (return F.nll_loss(F.dropout(log_probs,
    0.3, training=True), labels)). If this is a cross entropy, write this step in one of the spellings
    that the README lists; if not, it runs as written.
"""
