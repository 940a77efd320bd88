"""REINFORCE: the probabilities of one state, and the logarithms of those of the actions that were tried.

Source: none named; policy gradients of one state at a time
Family: Rows chosen after
"""

import torch
import torch.nn.functional as F

ACTIONS = 48


def inputs():
    return torch.randn(1, ACTIONS, requires_grad=True), torch.randint(ACTIONS, (5,)), torch.randn(5)


def loss(scores, actions, returns):
    probs = F.softmax(scores, dim=1)
    log_prob = torch.take(torch.log(probs.squeeze(0)), actions)
    return -(log_prob * returns).sum()


EXPECTED = """\
pick(y) - lse, pick(y2) - lse, pick(y3) - lse, pick(y4) - lse, pick(y5) - lse
row_stats: max,sumexp,pick,pick,pick,pick,pick
sharded: all_gather [7, N]
"""
