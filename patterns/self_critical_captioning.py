"""Self-critical captioning: gathered log-probabilities times a reward, a mask moved by one.

Source: ruotianluo/self-critical.pytorch, captioning/modules/losses.py
Family: Policy gradients
"""

import torch
import torch.nn.functional as F

B, S, V = 3, 6, 48


def inputs():
    seq = torch.randint(1, V, (B, S))
    seq[0, 3:] = seq[2, 5:] = 0
    return torch.randn(B, S, V, requires_grad=True), seq, torch.randn(B, S)


def loss(scores, seq, reward):
    logprobs = F.log_softmax(scores, dim=2).gather(2, seq.unsqueeze(2)).squeeze(2).reshape(-1)
    mask = (seq > 0).to(logprobs)
    mask = torch.cat([mask.new_ones(mask.size(0), 1), mask[:, :-1]], 1).reshape(-1)
    return torch.sum(-logprobs * reward.reshape(-1) * mask) / torch.sum(mask)


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
