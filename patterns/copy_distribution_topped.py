"""A pointer network: a final distribution of which more than the picked words is needed.

Source: none named; a metric of the three best, as beam search has them
Family: Kept beside
"""

import torch
import torch.nn.functional as F

N, V, WORDS = 12, 48, 9


def inputs():
    logits, attention = torch.randn(N, V, requires_grad=True), torch.randn(N, WORDS, requires_grad=True)
    return logits, attention, torch.randint(V, (N, WORDS)), torch.randint(V, (N,))


def loss(logits, attention, source, target):
    p = (0.5 * F.softmax(logits, 1)).scatter_add(1, source, 0.5 * F.softmax(attention, 1))
    return -torch.log(p.gather(1, target.unsqueeze(1)) + 1e-12).mean(), p.topk(3).indices


EXPECTED = """\
0.5*exp(pick(y) - lse)
kept: mul of all classes [12x48], read by scatter_add (p = (0.5 * F.softmax(logits,
    1)).scatter_add(1, source, 0.5 * F.softmax(attention, 1)))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
