"""Decoupled contrastive loss: the diagonal of the logits, and a logsumexp over all others of a row.

Source: raminnakhli/Decoupled-Contrastive-Learning, loss/dcl.py, its cross-view part
Family: Contrastive
"""

import torch
import torch.nn.functional as F

N, D = 48, 16


def inputs():
    return torch.randn(N, D, requires_grad=True), torch.randn(N, D, requires_grad=True)


def loss(z1, z2, temperature=0.1):
    z1, z2 = F.normalize(z1, dim=-1), F.normalize(z2, dim=-1)
    distance = torch.mm(z1, z2.t())
    positive_loss = -torch.diag(distance) / temperature
    neg_mask = torch.eye(z1.size(0), device=z1.device)
    negative_loss = torch.logsumexp(distance / temperature + neg_mask * -1e4, dim=1)
    return (positive_loss + negative_loss).mean()


EXPECTED = """\
pick(i)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
lse
row_stats: max,sumexp
sharded: all_gather [2, N]
"""
