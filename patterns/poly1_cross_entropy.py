"""PolyLoss: cross entropy plus epsilon times one minus the label's probability.

Source: abhuse/polyloss-pytorch, polyloss.py
Family: Focal and poly
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))


def loss(logits, labels, epsilon=1.0):
    one_hot = F.one_hot(labels, num_classes=V).to(device=logits.device, dtype=logits.dtype)
    pt = torch.sum(one_hot * F.softmax(logits, dim=-1), dim=-1)
    ce = F.cross_entropy(input=logits, target=labels, reduction="none")
    return (ce + epsilon * (1 - pt)).mean()


EXPECTED = """\
[y != -100](lse - pick(y))
1 - exp(pick(y) - lse)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
