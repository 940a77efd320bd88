"""BPR-max: how likely the target outscores each sampled item, weighed by the softmax of these, which learns.

Source: Hidasi and Karatzoglou, Recurrent neural networks with top-k gains, as the paper has it
Family: Each entry
"""

import torch

N, D, ITEMS = 12, 8, 48


def inputs():
    tensors = torch.randn(N, D), torch.randn(ITEMS, D)
    return *(t.requires_grad_() for t in tensors), torch.randint(ITEMS, (N,))


def loss(sessions, items, targets, reg=1.0):
    scores = sessions @ items.t()
    target = scores.gather(1, targets.unsqueeze(1))
    weights = torch.softmax(scores, dim=1)
    wins = torch.sum(weights * torch.sigmoid(target - scores), dim=1)
    penalty = torch.sum(weights * scores**2, dim=1)
    return torch.mean(-torch.log(wins + 1e-24) + reg * penalty)


EXPECTED = """\
pick(y)
sum p*sigmoid(n - z)
sum p*z^2
row_stats: max,sumexp,pick
sharded: left as written
"""
