"""T5: hidden states scaled before the tied head, [B, S, V] viewed as rows.

Source: huggingface/transformers, src/transformers/models/t5/modeling_t5.py
Family: Heads
"""

import torch
from torch import nn

B, S, V, D = 2, 8, 64, 16


def inputs():
    labels = torch.randint(V, (B, S))
    labels[1, 5:] = -100
    return torch.randn(B, S, D, requires_grad=True), torch.randn(V, D, requires_grad=True), labels


def loss(sequence_output, shared, labels):
    lm_logits = (sequence_output * (D**-0.5)) @ shared.T
    return nn.CrossEntropyLoss(ignore_index=-100)(lm_logits.view(-1, lm_logits.size(-1)), labels.view(-1))


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
