"""SimCLR: exponentials of similarities, those with oneself multiplied by 0 before the sum.

Source: michaeljiao11/ganaxy, SimCLR/loss_function.py, after dhruvbird's and colleagues' notebooks
Family: Contrastive
"""

import torch
import torch.nn.functional as F

N, D = 24, 12


def inputs():
    return torch.randn(N, D, requires_grad=True), torch.randn(N, D, requires_grad=True)


def loss(emb_i, emb_j, temperature=0.5):
    z_i, z_j = F.normalize(emb_i, dim=1), F.normalize(emb_j, dim=1)
    representations = torch.cat([z_i, z_j], dim=0)
    similarity_matrix = representations @ representations.t()
    positives = (z_i * z_j).sum(dim=1).repeat(2)
    negatives_mask = (~torch.eye(2 * N, dtype=torch.bool, device=emb_i.device)).float()
    numerator = torch.exp(positives / temperature)
    denominator = negatives_mask * torch.exp(similarity_matrix / temperature)
    return torch.sum(-torch.log(numerator / torch.sum(denominator, dim=1))) / (2 * N)


EXPECTED = """\
mean_p(q)*exp(lse)
row_stats: max,sumexp,expdot:0
sharded: all_gather [3, N]
"""
