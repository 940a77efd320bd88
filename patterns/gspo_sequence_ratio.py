"""GSPO in verl: one ratio a sequence from the mean log-ratio, the gradient by way of the tokens.

Source: volcengine/verl, verl/trainer/ppo/core_algos.py
Family: Policy gradients
"""

import torch

B, S, V = 3, 6, 64


def inputs():
    mask = (torch.arange(S)[None] < torch.tensor([[4], [6], [3]])).float()
    old = -4 - torch.rand(B, S)
    return torch.randn(B, S, V, requires_grad=True), torch.randint(V, (B, S)), old, torch.randn(B, 1), mask


def loss(logits, responses, old_log_prob, advantages, mask):
    lp = torch.log_softmax(logits, -1).gather(-1, responses[..., None])[..., 0]
    lengths = mask.sum(-1).clamp(min=1)
    mean_gap = ((lp - old_log_prob) * mask).sum(-1) / lengths
    log_ratio = lp - lp.detach() + mean_gap.detach().unsqueeze(-1)
    ratio = torch.exp(torch.clamp(log_ratio, max=10.0))
    values = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - 3e-4, 1 + 4e-4))
    return ((values * mask).sum(-1) / lengths).mean()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
