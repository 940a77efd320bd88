"""info-nce-pytorch: explicit negatives behind the positive, divided by the temperature in the call.

Source: RElbers/info-nce-pytorch, info_nce/__init__.py
Family: Contrastive
"""

import torch
import torch.nn.functional as F

N, D, M = 16, 12, 47


def inputs():
    return (
        torch.randn(N, D, requires_grad=True),
        torch.randn(N, D, requires_grad=True),
        torch.randn(M, D, requires_grad=True),
    )


def loss(query, positive_key, negative_keys, temperature=0.1):
    query, positive_key, negative_keys = (
        F.normalize(x, dim=-1) for x in (query, positive_key, negative_keys)
    )
    positive_logit = torch.sum(query * positive_key, dim=1, keepdim=True)
    negative_logits = query @ negative_keys.transpose(-2, -1)
    logits = torch.cat([positive_logit, negative_logits], dim=1)
    labels = torch.zeros(len(logits), dtype=torch.long, device=query.device)
    return F.cross_entropy(logits / temperature, labels)


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
