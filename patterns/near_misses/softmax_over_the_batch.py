"""A slip: log_softmax over the rows of the batch, nll_loss over the classes.

Source: none; nn.LogSoftmax(dim=0) on logits [N, V]
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return (2 * torch.randn(N, V)).requires_grad_(), torch.randint(V, (N,))


def loss(logits, labels):
    log_probs = torch.log_softmax(logits, dim=0)
    return F.nll_loss(log_probs, labels)


EXPECTED = """\
NOT_UNDERSTOOD: The log_softmax is over dimension 0, and nll_loss (return F.nll_loss(log_probs,
    labels)) takes classes on dimension 1. If this is a cross entropy, write this step in one of the
    spellings that the README lists; if not, it runs as written.
"""
