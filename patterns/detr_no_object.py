"""DETR: queries by classes, classes moved to axis 1, the weight of "no object" lowered.

Source: facebookresearch/detr, models/detr.py
Family: Class weights
"""

import torch
import torch.nn.functional as F

B, Q, C = 2, 6, 48


def inputs():
    return torch.randn(B, Q, C + 1, requires_grad=True), torch.randint(C, (3,))


def loss(src_logits, labels_o, eos_coef=0.1):
    empty_weight = torch.ones(C + 1)
    empty_weight[-1] = eos_coef
    target_classes = torch.full(src_logits.shape[:2], C, dtype=torch.int64)
    target_classes[0, :3] = labels_o
    value = F.cross_entropy(src_logits.transpose(1, 2), target_classes, empty_weight)
    cardinality = (src_logits.argmax(-1) != src_logits.shape[-1] - 1).sum(1)
    return value, cardinality


EXPECTED = """\
mean[y != -100](lse*w[y] - w[y]*pick(y))
argmax
row_stats: max,sumexp,pick,argmax
sharded: all_gather [4, N]
"""
