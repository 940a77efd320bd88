"""FixMatch: the most probable class of the weak view labels the strong one, where its probability is high.

Source: kekmarian/FixMatch-pytorch, train.py
Family: Soft targets
"""

import torch
import torch.nn.functional as F

N, MU, V = 4, 3, 48


def inputs():
    return (2 * torch.randn(N + 2 * MU * N, V)).requires_grad_(), torch.randint(V, (N,))


def loss(logits, targets_x, T=1.0, threshold=0.2):
    logits_x = logits[:N]
    logits_u_w, logits_u_s = logits[N:].chunk(2)
    loss_x = F.cross_entropy(logits_x, targets_x, reduction="mean")
    pseudo_label = torch.softmax(logits_u_w.detach() / T, dim=-1)
    max_probs, targets_u = torch.max(pseudo_label, dim=-1)
    mask = max_probs.ge(threshold).float()
    loss_u = (F.cross_entropy(logits_u_s, targets_u, reduction="none") * mask).mean()
    return loss_x + loss_u, mask.mean()


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
exp(max - lse)
argmax
row_stats: max,sumexp,argmax
sharded: all_gather [3, N]
[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
