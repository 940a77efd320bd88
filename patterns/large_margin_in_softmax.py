"""Large-margin softmax: beside the cross entropy that of the other classes to their mean, the label at -1e6.

Source: none named; the formula of Kobayashi, Large-Margin in Softmax Cross-Entropy Loss
Family: Label smoothing
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))


def loss(logits, labels, margin=0.3):
    target = F.one_hot(labels, V).to(logits.dtype)
    others = logits - 1e6 * target
    gap = (F.softmax(others, dim=1) - 1 / (V - 1)) * F.log_softmax(others, dim=1)
    regular = 0.5 * (gap * (1.0 - target)).sum(dim=1)
    return (F.cross_entropy(logits, labels, reduction="none") + margin * regular).mean()


EXPECTED = """\
[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
0.0031914893617021275*lse*mass(q) + 0.15*mean_pz(q) - 0.0031914893617021275*dot(q) -
    0.15*lse*mean_p(q)
row_stats: max,sumexp,dot:0,mass:0,expdot:0,expzdot:0
sharded: all_gather [6, N]
"""
