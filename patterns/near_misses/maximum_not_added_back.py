"""A slip: the maximum is taken off for stability, and the logit is picked from before.

Source: none; what a refactoring leaves behind
Family: Look-alikes
"""

import torch

N, V = 16, 48


def inputs():
    return (2 * torch.randn(N, V)).requires_grad_(), torch.randint(V, (N,))


def loss(logits, labels):
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    normaliser = shifted.exp().sum(dim=-1).log()
    return (normaliser - logits.gather(-1, labels[:, None]).squeeze(-1)).mean()


EXPECTED = """\
NOT_UNDERSTOOD: The maximum of a row is taken off and not added back: add it or detach it. If this
    is a cross entropy, write this step in one of the spellings that the README lists; if not, it runs
    as written.
"""
