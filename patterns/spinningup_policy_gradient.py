"""Spinning Up: minus the log-probability of the action times its weight, from a Categorical.

Source: openai/spinningup, spinup/examples/pytorch/pg_math/1_simple_pg.py
Family: Policy gradients
"""

import torch
from torch.distributions.categorical import Categorical

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,)), torch.randn(N)


def loss(logits, act, weights):
    logp = Categorical(logits=logits, validate_args=False).log_prob(act)
    return -(logp * weights).mean()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
