"""Circle loss: a logsumexp over the pairs that do not agree, the others at -inf, and softplus.

Source: KevinMusgrave/pytorch-metric-learning, losses/circle_loss.py, with a proxy for each class
Family: Normalisers
"""

import torch
import torch.nn.functional as F

N, D, V = 16, 12, 47


def inputs():
    return (
        torch.randn(N, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        torch.randint(V, (N,)),
    )


def loss(embeddings, proxies, labels, m=0.4, gamma=8.0):
    mat = F.normalize(embeddings, dim=-1) @ F.normalize(proxies, dim=-1).t()
    pos_mask = F.one_hot(labels, V).bool()
    weighed = gamma * torch.relu(mat.detach() + m) * (mat - m)
    an = torch.logsumexp(weighed.masked_fill(pos_mask, float("-inf")), dim=1)
    own = (F.normalize(embeddings, dim=-1) * F.normalize(proxies, dim=-1)[labels]).sum(-1)
    ap = -gamma * torch.relu(1 + m - own.detach()) * (own - (1 - m))
    return F.softplus(an + ap).mean()


EXPECTED = """\
lse
row_stats: max,sumexp
sharded: all_gather [2, N]
"""
