"""Multi-token prediction: the main loss, and that of one more head over the same vocabulary, shifted again.

Source: NVIDIA/Megatron-LM, megatron/core/transformer/multi_token_prediction.py
Family: Several losses
"""

import torch
import torch.nn.functional as F

B, S, V, D = 2, 8, 64, 8


def inputs():
    weight = (torch.randn(V, D) / 2).requires_grad_()
    main, further = torch.randn(B, S, D, requires_grad=True), torch.randn(B, S, D, requires_grad=True)
    return main, further, weight, torch.randint(V, (B, S)), torch.ones(B, S)


def shifted(labels, mask):
    labels, mask = torch.roll(labels, -1, dims=-1), torch.roll(mask, -1, dims=-1)
    mask = torch.cat([mask[:, :-1], torch.zeros_like(mask[:, -1:])], dim=-1)
    return labels, mask


def loss(main, further, weight, labels, mask, scale=0.1):
    main_loss = F.cross_entropy((main @ weight.T).float().view(-1, V), labels.view(-1), reduction="none")
    mtp_labels, mtp_mask = shifted(labels, mask)
    logits = (further @ weight.T).float()
    mtp = F.cross_entropy(logits.view(-1, V), mtp_labels.view(-1), reduction="none").view(B, S) * mtp_mask
    return (main_loss * mask.view(-1)).sum() / mask.sum() + scale * mtp.sum() / mtp_mask.sum()


EXPECTED = """\
[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
