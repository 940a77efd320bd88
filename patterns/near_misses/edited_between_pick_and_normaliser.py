"""A slip: the temperature divides in place, after the logits of the labels were taken.

Source: none; what a refactoring leaves behind
Family: Look-alikes
"""

import torch

N, V, D = 16, 48, 12


def inputs():
    return (
        torch.randn(N, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        torch.randint(V, (N,)),
    )


def loss(hidden, weight, labels):
    logits = hidden @ weight.t()
    picked = logits[torch.arange(N), labels]
    logits.div_(0.7)
    return (logits.logsumexp(-1) - picked).mean()


EXPECTED = """\
MUTATED: The logits are changed in place between what sub (return (logits.logsumexp(-1) -
    picked).mean()) joins. Make the edit out of place, or move it before or after the whole loss.
"""
