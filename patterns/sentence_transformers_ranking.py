"""Sentence Transformers: cosine scores times 20, the partner of each anchor is its label.

Source: UKPLab/sentence-transformers, sentence_transformers/losses/MultipleNegativesRankingLoss.py
Family: Contrastive
"""

import torch
import torch.nn.functional as F

N, D = 16, 12


def inputs():
    return (
        torch.randn(N, D, requires_grad=True),
        torch.randn(N, D, requires_grad=True),
        torch.randn(2 * N, D, requires_grad=True),
    )


def loss(anchors, positives, negatives, scale=20.0):
    candidates = torch.cat([positives, negatives], dim=0)
    scores = torch.mm(F.normalize(anchors, p=2, dim=1), F.normalize(candidates, p=2, dim=1).T) * scale
    return F.cross_entropy(scores, torch.arange(scores.size(0), device=scores.device))


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
