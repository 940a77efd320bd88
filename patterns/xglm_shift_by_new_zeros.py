"""transformers, XGLM: labels shifted into a new tensor by slice assignment, a padding token at the end.

Source: huggingface/transformers, src/transformers/models/xglm/modeling_xglm.py
Family: Causal shift
"""

import torch
from torch import nn

B, S, V, PAD = 2, 8, 64, 1


def inputs():
    return (3 * torch.randn(B, S, V)).requires_grad_(), torch.randint(V, (B, S))


def loss(logits, labels):
    shifted = labels.new_zeros(labels.shape)
    shifted[:, :-1] = labels[:, 1:].clone()
    shifted[:, -1] = PAD
    return nn.CrossEntropyLoss()(logits.view(-1, V), shifted.view(-1))


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
