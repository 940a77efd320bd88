"""CosFace: a margin off the label's cosine, a scale, cross entropy.

Source: MuggleWang/CosFace_pytorch, layer.py
Family: Images
"""

import torch
import torch.nn.functional as F

N, V, D = 16, 48, 12


def inputs():
    return (
        torch.randn(N, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        torch.randint(V, (N,)),
    )


def loss(x, weight, label, s=30.0, m=0.4):
    cosine = F.linear(F.normalize(x), F.normalize(weight))
    one_hot = torch.zeros_like(cosine)
    one_hot.scatter_(1, label.view(-1, 1), 1.0)
    return F.cross_entropy(s * (cosine - one_hot * m), label)


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
