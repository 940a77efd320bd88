"""Mixture of softmaxes: the log of a weighted sum of several softmaxes.

Source: zihangdai/mos, model.py
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, V, D, EXPERTS = 8, 48, 12, 3


def inputs():
    latent, prior = (
        torch.randn(N, EXPERTS, D, requires_grad=True),
        torch.randn(N, EXPERTS, requires_grad=True),
    )
    return latent, prior, torch.randn(V, D, requires_grad=True), torch.randint(V, (N,))


def loss(latent, prior_logits, weight, targets):
    logits = F.linear(latent.view(-1, D), weight)
    prior = F.softmax(prior_logits, dim=-1)
    probs = F.softmax(logits, dim=-1).view(-1, EXPERTS, V)
    probs = (probs * prior.unsqueeze(2).expand_as(probs)).sum(1)
    return F.nll_loss(torch.log(probs.add(1e-8)), targets)


EXPECTED = """\
exp(pick(y) - lse)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
SOFT_TARGETS: The classes are weighed by gather (return F.nll_loss(torch.log(probs.add(1e-8)),
    targets)) [8, 3, 1], of which a gradient is wanted. Detach the targets if they are meant as
    constants; no gradient reaches them through the kernels.
"""
