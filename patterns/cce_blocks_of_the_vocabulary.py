"""Cut cross entropy as its paper has it: blocks added by logaddexp, and an indexed product.

Source: Wijmans et al. 2024, Cut Your Losses in Large-Vocabulary Language Models
Family: Classes in blocks
"""

import torch

N, V, D, BLOCK = 24, 60, 8, 16


def inputs():
    e, c = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return e, c, torch.randint(V, (N,))


def loss(e, c, x):
    correct = (e * c[x]).sum(-1)
    lse = None
    for c_v in c.split(BLOCK):
        lse_v = torch.logsumexp(e @ c_v.T, dim=-1)
        lse = lse_v if lse is None else torch.logaddexp(lse, lse_v)
    return (lse - correct).mean()


EXPECTED = """\
lse
row_stats: max,sumexp
sharded: all_gather [2, N]
"""
