"""Detectron2, DeepLab: per-pixel losses, the hardest part of them averaged.

Source: facebookresearch/detectron2, projects/DeepLab/deeplab/loss.py
Family: Images
"""

import torch
import torch.nn.functional as F

B, C, H, W = 2, 48, 3, 4


def inputs():
    labels = torch.randint(C, (B, H, W))
    labels[:, 0, 0] = 255
    return torch.randn(B, C, H, W, requires_grad=True), labels, torch.rand(B, H, W)


def loss(logits, labels, weights, top_k_percent=0.25):
    pixel_losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=255) * weights
    pixel_losses = pixel_losses.contiguous().view(-1)
    hardest, _ = torch.topk(pixel_losses, int(top_k_percent * pixel_losses.numel()))
    return hardest.mean()


EXPECTED = """\
[y != 255](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
