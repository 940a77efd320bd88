"""audiocraft, MusicGen: a head for each codebook, their logits stacked, a cross entropy of each averaged.

Source: facebookresearch/audiocraft, audiocraft/models/lm.py and audiocraft/solvers/musicgen.py
Family: Several losses
"""

import torch
import torch.nn.functional as F

B, K, T, V, D = 2, 3, 7, 48, 8


def inputs():
    weights = torch.randn(K, V, D, requires_grad=True)
    hidden = torch.randn(B, T, D, requires_grad=True)
    return hidden, weights, torch.randint(V, (B, K, T)), torch.rand(B, K, T) > 0.2


def loss(out, weights, targets, mask):
    logits = torch.stack([F.linear(out, weights[k]) for k in range(K)], dim=1)
    ce = torch.zeros([], device=targets.device)
    for k in range(K):
        logits_k = logits[:, k, ...].contiguous().view(-1, logits.size(-1))
        targets_k = targets[:, k, ...].contiguous().view(-1)
        mask_k = mask[:, k, ...].contiguous().view(-1)
        ce_k = F.cross_entropy(logits_k[mask_k], targets_k[mask_k])
        ce += ce_k
    return ce / K


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
