"""TRPO: the KL of the old policy to the new by torch.distributions, entries set where a probability is 0.

Source: Stable-Baselines-Team/stable-baselines3-contrib, sb3_contrib/trpo/trpo.py; torch/distributions/kl.py
Family: Several sides
"""

import torch
from torch.distributions import Categorical
from torch.distributions.kl import _kl_categorical_categorical as kl_divergence

N, V = 16, 48


def inputs():
    actions, advantages = torch.randint(V, (N,)), torch.randn(N)
    return torch.randn(N, V, requires_grad=True), torch.randn(N, V), actions, advantages


def loss(logits, old_logits, actions, advantages):
    new, old = (Categorical(logits=z, validate_args=False) for z in (logits, old_logits))
    ratio = torch.exp(new.log_prob(actions) - old.log_prob(actions))
    return -(advantages * ratio).mean() + 0.1 * kl_divergence(old, new).mean()


EXPECTED = """\
pick(y) - lse
sum p*(log p - log q)
row_stats: max,sumexp,pick
sharded: left as written
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
