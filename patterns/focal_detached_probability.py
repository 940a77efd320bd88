"""focal_loss_pytorch: gathered log-probability, its probability detached, weights of the label's class.

Source: clcarwin/focal_loss_pytorch, focalloss.py
Family: Focal and poly
"""

import torch
import torch.nn.functional as F

B, C, S = 3, 48, 5


def inputs():
    return torch.randn(B, C, S, requires_grad=True), torch.randint(C, (B, S)), torch.rand(C) + 0.5


def loss(input, target, alpha, gamma=2):
    rows = input.transpose(1, 2).contiguous().view(-1, C)
    target = target.view(-1, 1)
    logpt = F.log_softmax(rows, dim=1).gather(1, target).view(-1)
    pt = logpt.detach().exp()
    logpt = logpt * alpha.gather(0, target.view(-1))
    return (-1 * (1 - pt) ** gamma * logpt).mean()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
