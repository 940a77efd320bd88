"""Maximum squares: unlabelled pixels are pushed to one class, more gently than by their entropy.

Source: ZJULearning/MaxSquareLoss, utils/loss.py
Family: Entropy and accuracy
"""

import torch
import torch.nn.functional as F

B, C, H, W = 2, 20, 5, 6


def inputs():
    return ((2 * torch.randn(B, C, H, W)).requires_grad_(),)


def loss(pred):
    prob = F.softmax(pred, dim=1)
    mask = torch.ones(B, H, W, dtype=torch.bool)
    mask[:, 0] = False
    squares = torch.pow(prob, 2).sum(dim=1)
    return -torch.mean(torch.where(mask, squares, 0.0)) / 2


EXPECTED = """\
exp(lse(2) - 2*lse)
row_stats: max,sumexp,sumexp^2
sharded: all_gather [3, N]
"""
