"""OpenRLHF: logits divided in place by the temperature, then picked minus a stacked logsumexp.

Source: OpenRLHF/OpenRLHF, openrlhf/models/utils.py
Family: Policy gradients
"""

import torch

B, S, V, D = 2, 7, 64, 8


def inputs():
    hidden = torch.randn(B, S, D, requires_grad=True)
    weight = (torch.randn(V, D) / 2).requires_grad_()
    return hidden, weight, torch.randint(V, (B, S))


def loss(hidden, weight, labels, temperature=0.7):
    logits = (hidden @ weight.t()).float()
    logits.div_(temperature)
    picked = torch.gather(logits, dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)
    lse = torch.stack([torch.logsumexp(sequence, dim=-1) for sequence in logits])
    return picked - lse


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
