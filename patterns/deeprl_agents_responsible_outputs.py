"""DeepRL-Agents: the probabilities of the actions that were taken, by their places among all of the batch.

Source: awjuliani/DeepRL-Agents, Vanilla-Policy.ipynb
Family: Policy gradients
"""

import torch

N, ACTIONS = 16, 64


def inputs():
    scores = (2 * torch.randn(N, ACTIONS)).requires_grad_()
    return scores, torch.randint(ACTIONS, (N,)), torch.randn(N)


def loss(scores, action_holder, reward_holder):
    output = scores.softmax(-1)
    indexes = torch.arange(0, output.shape[0], device=output.device) * output.shape[1] + action_holder
    responsible_outputs = torch.take(output, indexes)
    return -(responsible_outputs.log() * reward_holder).mean()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
