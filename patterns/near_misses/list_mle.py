"""ListMLE: every item against those ranked behind it, a normaliser of its own for each column.

Source: allegro/allRank, allrank/models/losses/listMLE.py
Family: Look-alikes
"""

import torch

N, V = 8, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.rand(N, V)


def loss(scores, relevance, eps=1e-10):
    order = relevance.argsort(dim=-1, descending=True)
    ranked = scores.gather(1, order)
    shifted = ranked - ranked.max(dim=1, keepdim=True).values
    behind = shifted.exp().flip(1).cumsum(1).flip(1)
    return (torch.log(behind + eps) - shifted).sum(1).mean()


EXPECTED = """\
nothing to fuse
"""
