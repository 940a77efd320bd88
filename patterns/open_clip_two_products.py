"""OpenCLIP: two products, one for each direction, averaged.

Source: mlfoundations/open_clip, src/open_clip/loss.py
Family: Contrastive
"""

import torch
import torch.nn.functional as F

N, D = 24, 12


def inputs():
    image = F.normalize(torch.randn(N, D), dim=-1).requires_grad_()
    text = F.normalize(torch.randn(N, D), dim=-1).requires_grad_()
    return image, text, torch.tensor(14.0, requires_grad=True)


def loss(image_features, text_features, logit_scale):
    logits_per_image = logit_scale * image_features @ text_features.T
    logits_per_text = logit_scale * text_features @ image_features.T
    labels = torch.arange(logits_per_image.shape[0], device=image_features.device, dtype=torch.long)
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
