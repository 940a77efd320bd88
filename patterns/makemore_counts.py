"""makemore: unshifted counts, and the log of the picked probability alone.

Source: karpathy/nn-zero-to-hero, lectures/makemore/makemore_part2_mlp.ipynb
Family: By hand
"""

import torch

N, V = 16, 48


def inputs():
    return (2 * torch.randn(N, V)).requires_grad_(), torch.randint(V, (N,))


def loss(logits, targets):
    counts = logits.exp()
    prob = counts / counts.sum(1, keepdims=True)
    return -prob[torch.arange(N), targets].log().mean()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
