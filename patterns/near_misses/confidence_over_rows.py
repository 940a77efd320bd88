"""A slip: the most probable row of each class, where the most probable class of each row is meant.

Source: none; a dimension mistaken
Family: Look-alikes
"""

import torch

N, V = 16, 48


def inputs():
    return ((2 * torch.randn(N, V)).requires_grad_(),)


def loss(logits):
    return (1 - torch.softmax(logits, dim=-1).max(dim=0).values).mean()


EXPECTED = """\
nothing to fuse
"""
