"""RLlib: entropy of a categorical by hand, from logits less their maximum.

Source: ray-project/ray, rllib/models/tf/tf_action_dist.py
Family: Entropy and accuracy
"""

import torch

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,)), torch.randn(N)


def loss(logits, actions, advantages):
    a0 = logits - torch.amax(logits, dim=1, keepdim=True)
    ea0 = torch.exp(a0)
    z0 = torch.sum(ea0, dim=1, keepdim=True)
    p0 = ea0 / z0
    entropy = torch.sum(p0 * (torch.log(z0) - a0), dim=1)
    logp = (a0 - torch.log(z0)).gather(1, actions[:, None]).squeeze(1)
    return -(logp * advantages).mean() - 0.01 * entropy.mean()


EXPECTED = """\
lse - mean_p
pick(y) - lse
row_stats: max,sumexp,pick,sumexpz
sharded: all_gather [4, N]
"""
