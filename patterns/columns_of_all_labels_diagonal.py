"""Policy gradient exercises: the columns of all actions, and of these the diagonal.

Source: in the manner of pytorch/examples, reinforcement_learning/reinforce.py
Family: Log-probabilities
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,)), torch.randn(N)


def loss(scores, actions, returns):
    log_probs = F.log_softmax(scores, dim=1)[:, actions]
    return -(torch.diagonal(log_probs) * returns).sum()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
