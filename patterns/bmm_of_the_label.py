"""Batched product: the row of the label by bmm, beside a linear layer with a bias, whose entry is looked up.

Source: none named; sampled and full softmax side by side, as in language models before the transformer
Family: Normalisers
"""

import torch
import torch.nn.functional as F

N, D, V = 16, 12, 48


def inputs():
    return (
        torch.randn(N, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        torch.randn(V, requires_grad=True),
        torch.randint(V, (N,)),
    )


def loss(hidden, weight, bias, targets):
    true_logits = torch.bmm(hidden.unsqueeze(1), weight[targets].unsqueeze(2)).view(-1) + bias[targets]
    return (F.linear(hidden, weight, bias).logsumexp(-1) - true_logits).sum()


EXPECTED = """\
lse
row_stats: max,sumexp
sharded: all_gather [2, N]
"""
