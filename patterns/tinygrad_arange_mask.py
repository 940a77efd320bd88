"""tinygrad: log-probabilities against arange(V) == label, times the mask of the labels that count.

Source: tinygrad/tinygrad, tinygrad/tensor.py
Family: Log-probabilities
"""

import torch

B, S, V = 2, 8, 64


def inputs():
    labels = torch.randint(V, (B, S))
    labels[0, :3] = -1
    return (3 * torch.randn(B, S, V)).requires_grad_(), labels


def loss(logits, labels, ignore_index=-1, label_smoothing=0.1):
    log_probs = logits.log_softmax(-1)
    loss_mask = labels != ignore_index
    hits = torch.arange(V, device=labels.device) == labels.unsqueeze(-1)
    y = hits * loss_mask.unsqueeze(-1)
    smooth = label_smoothing * (log_probs.mean(-1) * loss_mask)
    per_token = (1 - label_smoothing) * (log_probs * y).sum(-1) + smooth
    return -per_token.sum() / loss_mask.sum()


EXPECTED = """\
sum/V - lse
0.9*r*pick(y)*hit(y) - 0.9*lse*r*hit(y)
row_stats: max,sumexp,pick,sum
sharded: all_gather [4, N]
"""
