"""GraphCL: similarities over the norms, the positives indexed by ranges and taken off the sum.

Source: Shen-Lab/GraphCL, unsupervised_TU/gsimclr.py
Family: Contrastive
"""

import torch

N, D = 24, 12


def inputs():
    return torch.randn(N, D, requires_grad=True), torch.randn(N, D, requires_grad=True)


def loss(x, x_aug, temperature=0.5):
    batch_size = x.size(0)
    x_abs, x_aug_abs = x.norm(dim=1), x_aug.norm(dim=1)
    sim_matrix = torch.einsum("ik,jk->ij", x, x_aug) / torch.einsum("i,j->ij", x_abs, x_aug_abs)
    sim_matrix = torch.exp(sim_matrix / temperature)
    pos_sim = sim_matrix[range(batch_size), range(batch_size)]
    return -torch.log(pos_sim / (sim_matrix.sum(dim=1) - pos_sim)).mean()


EXPECTED = """\
exp(pick(i))
exp(lse) - exp(pick(i))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
