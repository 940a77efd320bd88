"""JEM: the log-density of data less that of samples, both logsumexps over the classes.

Source: wgrathwohl/JEM, train_wrn_ebm.py
Family: Normalisers
"""

import torch

N, D, V = 16, 6, 48


def inputs():
    return torch.randn(N, D), torch.randn(N, D), torch.randn(D, V, requires_grad=True)


def loss(data, samples, weight):
    f_p = (data @ weight).logsumexp(1).mean()
    f_q = (samples @ weight).logsumexp(1).mean()
    return -(f_p - f_q)


EXPECTED = """\
lse
row_stats: max,sumexp
sharded: all_gather [2, N]
lse
row_stats: max,sumexp
sharded: all_gather [2, N]
"""
