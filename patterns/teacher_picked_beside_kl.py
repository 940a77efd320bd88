"""OpenRLHF-like: a frozen policy's log-probabilities, picked for the ratio and whole for the divergence.

Source: in the manner of OpenRLHF/OpenRLHF, openrlhf/models/loss.py
Family: KL divergence
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    actions, advantages = torch.randint(V, (N, 1)), torch.randn(N)
    return torch.randn(N, V, requires_grad=True), torch.randn(N, V), actions, advantages


def loss(logits, frozen_logits, actions, advantages):
    frozen, log_probs = F.log_softmax(frozen_logits, dim=-1), F.log_softmax(logits, dim=-1)
    divergence = (frozen.exp() * (frozen - log_probs)).sum(-1)
    ratio = torch.exp(log_probs.gather(1, actions) - frozen.gather(1, actions)).squeeze(1)
    return (0.2 * divergence - ratio * advantages).mean()


EXPECTED = """\
pick(y) - lse
sum q*(log q - log p), targets constant
row_stats: max,sumexp,pick
sharded: as a loss of one side
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
