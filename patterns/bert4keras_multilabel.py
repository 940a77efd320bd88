"""bert4keras: several labels a row, scores of both signs, each beside a threshold of 0.

Source: bojone/bert4keras, backend.py, as retold in torch by lanson07/--pytorch, mutilabel_CE_loss.py
Family: Normalisers
"""

import torch

N, V = 16, 47


def inputs():
    y_true = (torch.rand(N, V) < 0.1).float()
    y_true[0] = 0
    return torch.randn(N, V, requires_grad=True), y_true


def loss(y_pred, y_true):
    y_pred = (1 - 2 * y_true) * y_pred
    y_pred_neg = y_pred - y_true * 1e12
    y_pred_pos = y_pred - (1 - y_true) * 1e12
    zeros = torch.zeros_like(y_pred[..., :1])
    y_pred_neg = torch.cat([y_pred_neg, zeros], dim=-1)
    y_pred_pos = torch.cat([y_pred_pos, zeros], dim=-1)
    return (torch.logsumexp(y_pred_neg, dim=-1) + torch.logsumexp(y_pred_pos, dim=-1)).mean()


EXPECTED = """\
lse
row_stats: max,sumexp
sharded: all_gather [2, N]
lse
row_stats: max,sumexp
sharded: all_gather [2, N]
"""
