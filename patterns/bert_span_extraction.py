"""BERT: start and end of an answer, the positions of the sequence being the classes.

Source: huggingface/transformers, src/transformers/models/bert/modeling_bert.py
Family: Several losses
"""

import torch
from torch import nn

B, S = 12, 48


def inputs():
    starts, ends = torch.randint(S, (B,)), torch.randint(S + 5, (B,))
    return torch.randn(B, S, 2, requires_grad=True), starts, ends


def loss(logits, start_positions, end_positions):
    start_logits, end_logits = logits.split(1, dim=-1)
    start_logits, end_logits = start_logits.squeeze(-1).contiguous(), end_logits.squeeze(-1).contiguous()
    ignored_index = start_logits.size(1)
    start_positions, end_positions = start_positions.clamp(0, S), end_positions.clamp(0, ignored_index)
    loss_fct = nn.CrossEntropyLoss(ignore_index=ignored_index)
    return (loss_fct(start_logits, start_positions) + loss_fct(end_logits, end_positions)) / 2


EXPECTED = """\
mean[y != 48](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
mean[y != 48](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
