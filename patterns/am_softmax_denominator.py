"""AM-Softmax: the label's margin taken by a diagonal, and a denominator by hand of it and all other classes.

Source: none named; as PyTorch implementations of angular penalties have it
Family: Images
"""

import torch
import torch.nn.functional as F

N, D, V = 12, 16, 48


def inputs():
    return (
        torch.randn(N, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        torch.randint(V, (N,)),
    )


def loss(x, weight, labels):
    s, m = 10.0, 0.35
    wf = F.linear(F.normalize(x), F.normalize(weight))
    numerator = s * (torch.diagonal(wf.transpose(0, 1)[labels]) - m)
    others = torch.ones_like(wf).scatter_(1, labels[:, None], 0.0)
    denominator = torch.exp(numerator) + torch.sum(torch.exp(s * wf) * others, dim=1)
    return -torch.mean(numerator - torch.log(denominator))


EXPECTED = """\
10*pick(y) - 3.5
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
mean_p(q)*exp(lse)
row_stats: max,sumexp,expdot:0
sharded: all_gather [3, N]
"""
