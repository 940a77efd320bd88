"""A slip: the confidence by amax, whose gradient all equal classes share, where max(dim) is meant.

Source: none; max(dim).values without its indices
Family: Look-alikes
"""

import torch

N, V = 16, 48


def inputs():
    return ((2 * torch.randn(N, V)).requires_grad_(),)


def loss(logits):
    return (1 - torch.softmax(logits, dim=-1).amax(dim=-1)).mean()


EXPECTED = """\
NOT_UNDERSTOOD: All classes that have the maximum share the gradient of amax: take max(dim).values,
    whose first class has it. If this is a cross entropy, write this step in one of the spellings that
    the README lists; if not, it runs as written.
"""
