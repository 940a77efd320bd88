"""GPT-2 for sequences: scores of every token, of which those of each last token are classified.

Source: huggingface/transformers, models/gpt2/modeling_gpt2.py
Family: Rows chosen after
"""

import torch
import torch.nn as nn

B, S, D, LABELS, PAD = 6, 9, 8, 40, 3


def inputs():
    input_ids = torch.randint(4, 20, (B, S))
    for row in range(B):
        input_ids[row, S - row :] = PAD
    tensors = torch.randn(B, S, D), torch.randn(LABELS, D)
    return *(t.requires_grad_() for t in tensors), input_ids, torch.randint(LABELS, (B,))


def loss(hidden_states, score, input_ids, labels):
    logits = nn.functional.linear(hidden_states, score)
    non_pad_mask = (input_ids != PAD).to(logits.device, torch.int32)
    token_indices = torch.arange(input_ids.shape[-1], device=logits.device, dtype=torch.int32)
    last_non_pad_token = (token_indices * non_pad_mask).argmax(-1)
    pooled_logits = logits[torch.arange(B, device=logits.device), last_non_pad_token]
    return nn.CrossEntropyLoss()(pooled_logits.view(-1, LABELS), labels.view(-1))


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
