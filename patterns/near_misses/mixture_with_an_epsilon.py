"""A Jensen-Shannon divergence with an epsilon in the logarithm: no mixture of the two any more.

Source: none; a guard against log(0), as many write it
Family: Look-alikes
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
SOFT_TARGETS: The classes are weighed by softmax (p, q = F.softmax(logits1, dim=-1),
    F.softmax(logits2, dim=-1)) [12, 48], of which a gradient is wanted. Detach the targets if they are
    meant as constants; no gradient reaches them through the kernels.
NOT_UNDERSTOOD: The result of softmax goes into add (m = 0.5 * (p + q)). If this is a cross entropy,
    write this step in one of the spellings that the README lists; if not, it runs as written.
"""
