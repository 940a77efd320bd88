"""A slip: the sum is over the maximum of all blocks, and that of the last but one is added back.

Source: none; what a refactoring leaves behind
Family: Look-alikes
"""

import torch

N, V, D, BLOCK = 16, 48, 8, 12


def inputs():
    return torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)


def loss(hidden, weight):
    m, s = torch.full((N,), float("-inf"), dtype=hidden.dtype), torch.zeros(N, dtype=hidden.dtype)
    for w in weight.split(BLOCK):
        z = hidden @ w.t()
        m_old, m = m, torch.maximum(m, z.amax(dim=-1))
        s = s * torch.exp(m_old - m) + torch.exp(z - m[:, None]).sum(dim=-1)
    return (m_old + torch.log(s)).mean()


EXPECTED = """\
nothing to fuse
"""
