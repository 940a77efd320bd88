"""nnU-Net: class weights, and a channel axis on the target.

Source: MIC-DKFZ/nnUNet, nnunetv2/training/loss/robust_ce_loss.py
Family: Class weights
"""

import torch
from torch import nn

B, C, H, W = 2, 48, 3, 3


def inputs():
    scores = (3 * torch.randn(B, C, H, W)).requires_grad_()
    return scores, torch.randint(C, (B, 1, H, W)), torch.rand(C) + 0.5


def loss(scores, target, weight):
    target = target[:, 0]
    return nn.functional.cross_entropy(scores, target.long(), weight=weight)


EXPECTED = """\
mean[y != -100](lse*w[y] - w[y]*pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
