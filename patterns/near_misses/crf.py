"""CRF: a normaliser over all sequences of tags, one logsumexp a step.

Source: kmkurn/pytorch-crf, torchcrf/__init__.py
Family: Look-alikes
"""

import torch

T, B, V = 4, 3, 24


def inputs():
    return (
        torch.randn(T, B, V, requires_grad=True),
        torch.randn(V, V, requires_grad=True),
        torch.randint(V, (T, B)),
    )


def loss(emissions, transitions, tags):
    rows = torch.arange(B)
    gold, score = emissions[0, rows, tags[0]], emissions[0]
    for i in range(1, T):
        gold = gold + transitions[tags[i - 1], tags[i]] + emissions[i, rows, tags[i]]
        ahead = score.unsqueeze(2) + transitions + emissions[i].unsqueeze(1)
        score = torch.logsumexp(ahead, dim=1)
    return (torch.logsumexp(score, dim=1) - gold).sum()


EXPECTED = """\
NORMALISER: Nothing but a normaliser is taken along dimension 1 of [3, 24, 24], so that rows would
    have to be copied. A normaliser alone is fused where nothing else needs its logits, so it runs as
    written.
"""
