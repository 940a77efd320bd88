"""Cut cross entropy: the label's logit as a product with its row of the weight, apart from the head.

Source: apple/ml-cross-entropy, cut_cross_entropy/indexed_dot.py and cce.py
Family: Normalisers
"""

import torch

N, D, V = 16, 12, 48


def inputs():
    targets = torch.randint(V, (N,))
    return torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True), targets


def loss(e, c, targets):
    neg_dot = -(e * c[targets]).sum(dim=-1)
    return (neg_dot + (e @ c.T).logsumexp(dim=-1)).mean()


EXPECTED = """\
lse
row_stats: max,sumexp
sharded: all_gather [2, N]
"""
