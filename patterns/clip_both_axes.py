"""transformers, CLIP: one similarity matrix, cross entropy over its rows and over its columns.

Source: huggingface/transformers, src/transformers/models/clip/modeling_clip.py
Family: Contrastive
"""

import torch
import torch.nn.functional as F

N, D = 24, 12


def inputs():
    text, image = torch.randn(N, D, requires_grad=True), torch.randn(N, D, requires_grad=True)
    return text, image, torch.tensor(1.5, requires_grad=True)


def contrastive_loss(logits):
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def loss(text_embeds, image_embeds, logit_scale):
    text_embeds = text_embeds / text_embeds.norm(p=2, dim=-1, keepdim=True)
    image_embeds = image_embeds / image_embeds.norm(p=2, dim=-1, keepdim=True)
    logits_per_text = torch.matmul(text_embeds, image_embeds.t()) * logit_scale.exp()
    return (contrastive_loss(logits_per_text) + contrastive_loss(logits_per_text.t())) / 2.0


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
