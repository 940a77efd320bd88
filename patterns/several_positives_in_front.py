"""InfoNCE with several positives in front: a slice of the log-probabilities, summed.

Source: andrewhamara/SOLIS, infoNCE.py
Family: Contrastive
"""

import torch
import torch.nn.functional as F

N, P, D, K = 16, 3, 12, 45


def inputs():
    return torch.randn(N, D, requires_grad=True), torch.randn(N, P, D), torch.randn(K, D)


def loss(anchor, positives, negatives, temperature=0.5):
    sim_pos = torch.einsum("bd,bpd->bp", anchor, positives) / temperature
    sim_neg = torch.einsum("bd,nd->bn", anchor, negatives) / temperature
    log_softmax = F.log_softmax(torch.cat([sim_pos, sim_neg], dim=-1), dim=-1)
    return -log_softmax[:, :P].mean(dim=-1).mean()


EXPECTED = """\
0.3333333333333333*dot(k) - 0.3333333333333333*lse*mass(k)
row_stats: max,sumexp,seendot:0
sharded: all_gather [3, N]
"""
