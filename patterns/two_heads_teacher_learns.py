"""Torchreid, deep mutual learning: the peer's head learns as well, by its probabilities.

Source: KaiyangZhou/deep-person-reid, projects/DML/dml.py
Family: Several sides
"""

import torch
import torch.nn.functional as F

N, V, D, E = 16, 64, 8, 12


def inputs():
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return hidden, weight, torch.randn(N, E), torch.randn(V, E, requires_grad=True)


def loss(hidden, weight, peer_hidden, peer_weight):
    log_p = F.log_softmax(hidden @ weight.t(), dim=1)
    q = F.softmax(peer_hidden @ peer_weight.t(), dim=1)
    return F.kl_div(log_p, q, reduction="none").sum(1).mean()


EXPECTED = """\
sum q*(log q - log p)
row_stats: max,sumexp
sharded: left as written
"""
