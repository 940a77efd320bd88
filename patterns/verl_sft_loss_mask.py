"""verl: shifted logits, a response mask, a small number below the line.

Source: volcengine/verl, verl/trainer/fsdp_sft_trainer.py
Family: Masks and weights
"""

import torch
from torch import nn

B, S, V = 2, 8, 64


def inputs():
    logits = (3 * torch.randn(B, S, V)).bfloat16().requires_grad_()
    mask = torch.arange(S).expand(B, S) > 2
    return logits, torch.randint(V, (B, S)), mask


def loss(logits, input_ids, loss_mask):
    mask = loss_mask[:, :-1].reshape(-1)
    shift_logits = logits[..., :-1, :].contiguous().view(-1, V)
    shift_labels = input_ids[:, 1:].contiguous().view(-1)
    losses = nn.CrossEntropyLoss(reduction="none")(shift_logits, shift_labels)
    losses = losses * mask.to(losses.device)
    return torch.sum(losses) / (torch.sum(mask) + 1e-8)


EXPECTED = """\
[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
