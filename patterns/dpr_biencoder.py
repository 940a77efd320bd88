"""DPR: nll of log-probabilities over all contexts of the batch, and how many questions find theirs.

Source: facebookresearch/DPR, dpr/models/biencoder.py
Family: Contrastive
"""

import torch
import torch.nn.functional as F

N, M, D = 12, 48, 8


def inputs():
    q, ctx = torch.randn(N, D, requires_grad=True), torch.randn(M, D, requires_grad=True)
    return q, ctx, torch.randperm(M)[:N]


def loss(q_vectors, ctx_vectors, positive_idx):
    scores = torch.matmul(q_vectors, torch.transpose(ctx_vectors, 0, 1))
    softmax_scores = F.log_softmax(scores.view(q_vectors.size(0), -1), dim=1)
    value = F.nll_loss(softmax_scores, positive_idx, reduction="mean")
    _, max_idxs = torch.max(softmax_scores, 1)
    return value, (max_idxs == positive_idx).sum()


EXPECTED = """\
mean[y != -100](lse - pick(y))
argmax
row_stats: max,sumexp,pick,argmax
sharded: all_gather [4, N]
"""
