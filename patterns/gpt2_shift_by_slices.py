"""transformers: the logits lose their last token, the labels their first.

Source: huggingface/transformers, src/transformers/models/gpt2/modeling_gpt2.py
Family: Causal shift
"""

import torch
from torch import nn

B, S, V = 2, 8, 64


def inputs():
    labels = torch.randint(V, (B, S))
    labels[0, :4] = -100
    return (3 * torch.randn(B, S, V)).requires_grad_(), labels


def loss(lm_logits, labels):
    shift_logits = lm_logits[..., :-1, :].contiguous()
    shift_labels = labels[..., 1:].contiguous()
    return nn.CrossEntropyLoss()(shift_logits.view(-1, shift_logits.size(-1)), shift_labels.view(-1))


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
