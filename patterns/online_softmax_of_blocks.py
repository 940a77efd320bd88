"""The online softmax over given logits: each block's maximum and sum by themselves, merged as they come.

Source: Milakov and Gimelshein 2018, Online normalizer calculation for softmax
Family: Classes in blocks
"""

import torch

N, V, BLOCKS = 24, 60, 4


def inputs():
    y = torch.randint(V, (N,))
    y[:4] = torch.tensor([0, 14, 15, V - 1])
    return (2 * torch.randn(N, V)).requires_grad_(), y


def merged(a, b):
    """(m, d) of two blocks together."""
    m = torch.maximum(a[0], b[0])
    return m, a[1] * torch.exp(a[0] - m) + b[1] * torch.exp(b[0] - m)


def loss(x, y):
    state, at_label, start = None, 0.0, 0
    for part in x.chunk(BLOCKS, dim=-1):
        m = part.detach().amax(dim=-1)
        block = m, torch.exp(part - m[:, None]).sum(dim=-1)
        state = block if state is None else merged(state, block)
        outside = (y < start) | (y >= start + part.shape[-1])
        column = (y - start).masked_fill(outside, 0)
        at_label = at_label + part.gather(-1, column[:, None])[:, 0].masked_fill(outside, 0.0)
        start += part.shape[-1]
    m, d = state
    return (torch.log(d) + m - at_label).mean()


EXPECTED = """\
lse
pick(y)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
