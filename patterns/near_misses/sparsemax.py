"""Sparsemax: a threshold from the sorted scores takes the place of the normaliser.

Source: deep-spin/entmax, entmax/losses.py and entmax/activations.py
Family: Look-alikes
"""

import torch

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))


def loss(scores, target):
    ranked = scores.sort(dim=1, descending=True).values
    sums = ranked.cumsum(dim=1) - 1
    support = (torch.arange(1, V + 1) * ranked > sums).sum(dim=1, keepdim=True)
    p = torch.clamp(scores - sums.gather(1, support - 1) / support, min=0)
    omega = (1 - (p**2).sum(dim=1)) / 2
    return (omega + torch.einsum("ij,ij->i", p, scores) - scores.gather(1, target[:, None])[:, 0]).mean()


EXPECTED = """\
nothing to fuse
"""
