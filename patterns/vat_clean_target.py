"""VAT: KL of perturbed predictions to clean ones that are detached.

Source: lyakaap/VAT-pytorch, vat.py
Family: KL divergence
"""

import torch
import torch.nn.functional as F

N, V, D = 16, 48, 12


def inputs():
    return torch.randn(N, D), torch.randn(N, D), (torch.randn(V, D) / 4).requires_grad_()


def loss(x, r_adv, weight):
    with torch.no_grad():
        pred = F.softmax(F.linear(x, weight), dim=1)
    logp_hat = F.log_softmax(F.linear(x + r_adv, weight), dim=1)
    return F.kl_div(logp_hat, pred, reduction="batchmean")


EXPECTED = """\
batchmean(lse*mass(q) + mass(q2) - dot(q))
row_stats: max,sumexp,dot:0,mass:0
sharded: all_gather [4, N]
"""
