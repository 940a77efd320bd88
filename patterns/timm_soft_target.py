"""timm: cross entropy to soft targets as a sum of products.

Source: huggingface/pytorch-image-models, timm/loss/cross_entropy.py
Family: Soft targets
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.rand(N, V).softmax(-1)


def loss(x, target):
    return torch.sum(-target * F.log_softmax(x, dim=-1), dim=-1).mean()


EXPECTED = """\
dot(q) - lse*mass(q)
row_stats: max,sumexp,dot:0,mass:0
sharded: all_gather [4, N]
"""
