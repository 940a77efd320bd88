"""MMSegmentation: a map of losses, averaged over the pixels that are labelled.

Source: open-mmlab/mmsegmentation, mmseg/models/losses/cross_entropy_loss.py
Family: Cross entropy
"""

import torch
import torch.nn.functional as F

B, C, H, W = 2, 48, 3, 4


def inputs():
    scores = (3 * torch.randn(B, C, H, W)).requires_grad_()
    label = torch.randint(C, (B, H, W))
    label[:, 0, :2] = 255
    return scores, label


def loss(scores, label, ignore_index=255, loss_weight=0.4):
    pixels = F.cross_entropy(scores, label, reduction="none", ignore_index=ignore_index)
    counted = label.numel() - (label == ignore_index).sum()
    return loss_weight * pixels.sum() / (counted + torch.finfo(torch.float32).eps)


EXPECTED = """\
[y != 255](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
