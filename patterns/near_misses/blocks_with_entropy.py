"""prime-rl: an entropy of a third sum, which is carried over chunks of the vocabulary with the other two.

Source: PrimeIntellect-ai/prime-rl, src/prime_rl/trainer/models/layers/lm_head.py
Family: Look-alikes
"""

import torch

N, V, D, CHUNK = 16, 48, 8, 12


def inputs():
    return torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)


def loss(hidden, weight):
    m = torch.full((N,), float("-inf"), dtype=hidden.dtype)
    s, t = torch.zeros_like(m), torch.zeros_like(m)
    for w in weight.split(CHUNK):
        logits = hidden @ w.t()
        m_new = torch.maximum(m, torch.amax(logits, dim=-1))
        scale = torch.exp(m - m_new)
        e = torch.exp(logits - m_new.unsqueeze(-1))
        s = s * scale + e.sum(dim=-1)
        t = t * scale + (e * logits).sum(dim=-1)
        m = m_new
    return (m + torch.log(s) - t / s).mean()


EXPECTED = """\
nothing to fuse
"""
