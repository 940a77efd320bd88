"""makemore: counts, their sum to the power of minus one, probabilities, and the log of those.

Source: karpathy/nn-zero-to-hero, lectures/makemore/makemore_part4_backprop.ipynb
Family: By hand
"""

import torch

N, V = 16, 48


def inputs():
    return (2 * torch.randn(N, V)).requires_grad_(), torch.randint(V, (N,))


def loss(logits, targets):
    maxima = logits.max(1, keepdim=True).values
    counts = (logits - maxima).exp()
    inverse = counts.sum(1, keepdim=True) ** -1
    log_probs = (counts * inverse).log()
    return -log_probs[range(N), targets].mean()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
