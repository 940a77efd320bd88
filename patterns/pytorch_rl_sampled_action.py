"""Actor-critic: an action is sampled of the probabilities whose logarithm at another action is the loss.

Source: none named; on-policy code that samples for the next step in the same graph
Family: Kept beside
"""

import torch
import torch.nn.functional as F

N, D, ACTIONS = 12, 8, 40


def inputs():
    tensors = torch.randn(N, D), torch.randn(ACTIONS, D)
    return *(t.requires_grad_() for t in tensors), torch.randint(ACTIONS, (N,)), torch.randn(N)


def loss(hidden, weight, actions, advantages):
    probs = F.softmax(F.linear(hidden, weight), dim=-1)
    log_prob = probs.gather(1, actions.unsqueeze(1)).squeeze(1).log()
    greedy = probs.detach().sort(-1, descending=True).indices[:, 0]
    return -(log_prob * advantages).mean(), greedy


EXPECTED = """\
pick(y) - lse
kept: softmax of all classes [12x40], read by sort (greedy = probs.detach().sort(-1,
    descending=True).indices[:, 0])
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
