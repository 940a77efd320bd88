"""OpenFold: log-probabilities against one-hot labels, a mask, a small number below the line.

Source: aqlaboratory/openfold, openfold/utils/loss.py
Family: Log-probabilities
"""

import torch

B, S, V = 2, 8, 48


def inputs():
    return (2 * torch.randn(B, S, V)).requires_grad_(), torch.randint(V, (B, S)), torch.ones(B, S).tril()


def loss(logits, true_classes, mask, eps=1e-8):
    one_hot = torch.nn.functional.one_hot(true_classes, num_classes=V)
    errors = -1 * torch.sum(one_hot * torch.nn.functional.log_softmax(logits, dim=-1), dim=-1)
    return torch.sum(errors * mask, dim=(-1, -2)) / (eps + torch.sum(mask, dim=(-1, -2)))


EXPECTED = """\
lse - pick(y)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
