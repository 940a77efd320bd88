"""By hand: a Jensen-Shannon divergence with an epsilon in the logarithm, entry by entry.

Source: none named; a guard against log(0), as many write it
Family: Each entry
"""

import torch
import torch.nn.functional as F

N, V, EPSILON = 12, 48, 1e-8


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randn(N, V, requires_grad=True)


def loss(logits1, logits2):
    p, q = F.softmax(logits1, dim=-1), F.softmax(logits2, dim=-1)
    m = 0.5 * (p + q)
    kl_p = (p * ((p + EPSILON).log() - (m + EPSILON).log())).sum(-1)
    kl_q = (q * ((q + EPSILON).log() - (m + EPSILON).log())).sum(-1)
    return 0.5 * (kl_p + kl_q).mean()


EXPECTED = """\
sum p*(log(p + 1e-08) - log(0.5*p + 0.5*q + 1e-08))
sum q*(log(q + 1e-08) - log(0.5*p + 0.5*q + 1e-08))
row_stats: max,sumexp
sharded: left as written
"""
