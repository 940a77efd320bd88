"""Next items: the embedding of the next item looked up, its score against all items beside it.

Source: kang205/SASRec, model.py, with a softmax over all items, in torch
Family: Normalisers
"""

import torch
import torch.nn.functional as F

B, S, D, V = 2, 8, 12, 48


def inputs():
    items = torch.randint(1, V, (B, S))
    items[1, 5:] = 0
    return torch.randn(B, S, D, requires_grad=True), torch.randn(V, D, requires_grad=True), items


def loss(hidden, table, items):
    target = F.embedding(items, table)
    positive = (hidden * target).sum(dim=-1)
    normaliser = torch.logsumexp(torch.matmul(hidden, table.t()), dim=-1)
    counted = (items != 0).float()
    return ((normaliser - positive) * counted).sum() / counted.sum()


EXPECTED = """\
lse
row_stats: max,sumexp
sharded: all_gather [2, N]
"""
