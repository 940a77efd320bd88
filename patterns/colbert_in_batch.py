"""ColBERT: late-interaction scores of all pairs of the batch, the own document is the label.

Source: stanford-futuredata/ColBERT, colbert/training/training.py and colbert/modeling/colbert.py
Family: Contrastive
"""

import torch

N, NWAY, L, D = 12, 4, 3, 8


def inputs():
    return torch.randn(N, L, D, requires_grad=True), torch.randn(N * NWAY, 5, D, requires_grad=True)


def loss(Q, docs):
    scores = torch.einsum("qld,kmd->qklm", Q, docs).max(-1).values.sum(-1)
    labels = torch.arange(0, N * NWAY, NWAY, device=Q.device)
    return torch.nn.CrossEntropyLoss()(scores, labels)


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
