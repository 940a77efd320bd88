"""CleanRL: PPO with torch.distributions.Categorical, its log_prob and its entropy.

Source: vwxyzjn/cleanrl, cleanrl/ppo.py
Family: Policy gradients
"""

import torch
from torch.distributions import Categorical

N, V = 16, 48


def inputs():
    old = -4 - torch.rand(N)
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,)), old, torch.randn(N)


def loss(logits, actions, old_logprob, advantages, clip=0.2, bonus=0.01):
    policy = Categorical(logits=logits, validate_args=False)
    ratio = (policy.log_prob(actions) - old_logprob).exp()
    clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
    pg_loss = torch.max(-advantages * ratio, -advantages * clipped).mean()
    return pg_loss - bonus * policy.entropy().mean()


EXPECTED = """\
pick(y) - lse
lse - mean_p
row_stats: max,sumexp,pick,sumexpz
sharded: all_gather [4, N]
"""
