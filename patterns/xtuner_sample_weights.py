"""XTuner: a token weighs one over its sequence's length, so that sequences weigh alike.

Source: InternLM/xtuner, xtuner/v1/loss/ce_loss.py
Family: Masks and weights
"""

import torch
import torch.nn.functional as F

B, S, V = 3, 6, 64


def inputs():
    logits = (3 * torch.randn(B, S, V)).requires_grad_()
    labels = torch.randint(V, (B, S))
    labels[0, 4:] = -100
    labels[2, 1:] = -100
    return logits, labels


def loss(logits, labels):
    counted = labels != -100
    weight = torch.where(counted, 1.0 / counted.sum(-1, keepdim=True), 0.0)
    weight = weight / weight.sum()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    return (losses * weight.flatten()).sum()


EXPECTED = """\
[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
