"""torchtune: labels shifted by gluing a column of ignored ones to them.

Source: pytorch/torchtune, recipes/full_finetune_single_device.py
Family: Causal shift
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    logits = (3 * torch.randn(B, S, V)).bfloat16().requires_grad_()
    return logits, torch.randint(V, (B, S)), torch.full((4, 1), -100)


def loss(logits, labels, ignored):
    labels = torch.hstack((labels[..., 1:], ignored[: labels.shape[0]]))
    return F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), ignore_index=-100)


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
