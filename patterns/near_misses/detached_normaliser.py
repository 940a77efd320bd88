"""A contrastive trick: the normaliser without its gradient, which makes two losses of one.

Source: none; right though it looks wrong, for each statistic keeps the gradient that it had
Family: Look-alikes
"""

import torch

N, V = 16, 48


def inputs():
    return (2 * torch.randn(N, V)).requires_grad_(), torch.randint(V, (N,))


def loss(logits, labels):
    picked = logits.gather(-1, labels[:, None]).squeeze(-1)
    return (logits.detach().logsumexp(-1) - picked).mean()


EXPECTED = """\
pick(y)
lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
