"""torchvision references: class dimension 1, pixels of 255 ignored, an auxiliary head at half weight.

Source: pytorch/vision, references/segmentation/train.py
Family: Images
"""

import torch
import torch.nn.functional as F

B, C, H, W = 2, 48, 3, 4


def inputs():
    target = torch.randint(C, (B, H, W))
    target[:, 0] = 255
    return torch.randn(B, C, H, W, requires_grad=True), torch.randn(B, C, H, W, requires_grad=True), target


def loss(out, aux, target):
    losses = {name: F.cross_entropy(x, target, ignore_index=255) for name, x in (("out", out), ("aux", aux))}
    return losses["out"] + 0.5 * losses["aux"]


EXPECTED = """\
mean[y != 255](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
mean[y != 255](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
