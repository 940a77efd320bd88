"""A slip: the temperature divides the picked logit but not those of the normaliser.

Source: none; what a refactoring leaves behind
Family: Look-alikes
"""

import torch

N, V = 16, 64


def inputs():
    return torch.randn(N, V).requires_grad_(), torch.randint(V, (N,))


def loss(logits, labels):
    picked = (logits / 0.7).gather(-1, labels[:, None])[:, 0]
    return (logits.logsumexp(-1) - picked).mean()


EXPECTED = """\
NOT_UNDERSTOOD: The result of logsumexp goes into sub (return (logits.logsumexp(-1) -
    picked).mean()). It joins values of different logits. If this is a cross entropy, write this step in
    one of the spellings that the README lists; if not, it runs as written.
"""
