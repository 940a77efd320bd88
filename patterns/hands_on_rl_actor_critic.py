"""Hands-on RL: the log of the gathered softmax, times an advantage.

Source: boyu-ai/Hands-on-RL, 第10章-Actor-Critic算法.ipynb
Family: Log-probabilities
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return (2 * torch.randn(N, V)).requires_grad_(), torch.randint(V, (N, 1)), torch.randn(N, 1)


def loss(scores, actions, td_delta):
    log_probs = torch.log(F.softmax(scores, dim=1).gather(1, actions))
    return torch.mean(-log_probs * td_delta.detach())


EXPECTED = """\
lse - pick(y)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
