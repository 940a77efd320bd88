"""SimCLR: positives beside the batch with itself, whose diagonal is lowered by 1e9, one-hot targets.

Source: google-research/simclr, objective.py
Family: Contrastive
"""

import torch
import torch.nn.functional as F

N, D = 24, 12


def inputs():
    return torch.randn(N, D, requires_grad=True), torch.randn(N, D, requires_grad=True)


def loss(hidden1, hidden2, temperature=0.5):
    a, b = F.normalize(hidden1, dim=-1), F.normalize(hidden2, dim=-1)
    labels = F.one_hot(torch.arange(N, device=a.device), 2 * N).float()
    masks = torch.eye(N, device=a.device) * 1e9
    logits_aa, logits_bb = a @ a.T / temperature - masks, b @ b.T / temperature - masks
    logits_ab, logits_ba = a @ b.T / temperature, b @ a.T / temperature
    loss_a = F.cross_entropy(torch.cat([logits_ab, logits_aa], 1), labels)
    loss_b = F.cross_entropy(torch.cat([logits_ba, logits_bb], 1), labels)
    return loss_a + loss_b


EXPECTED = """\
mean(lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
mean(lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
