"""Next-item recommenders: scores of all items, that of the padding item, and of two others, written over.

Source: none named; SASRec and its like with a softmax over all items
Family: Heads
"""

import torch
import torch.nn.functional as F

B, S, D, ITEMS = 12, 6, 8, 64


def inputs():
    next_item = torch.randint(3, ITEMS, (B,))
    items = torch.randn(ITEMS, D, requires_grad=True)
    return torch.randn(B, S, D, requires_grad=True), items, next_item, torch.tensor([1, 2])


def loss(seqs, items, next_item, special):
    logits = seqs[:, -1, :] @ items.t()
    logits[:, 0] = -1e9
    logits[:, special] = float("-inf")
    return F.cross_entropy(logits, next_item)


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
