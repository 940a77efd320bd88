"""ST-MoE: the square of the normaliser, averaged over all tokens, beside a masked cross entropy.

Source: lucidrains/st-moe-pytorch, st_moe_pytorch/st_moe_pytorch.py
Family: Z-loss
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    labels = torch.randint(V, (B, S))
    labels[0, :3] = 0
    return (2 * torch.randn(B, S, V)).requires_grad_(), labels


def loss(logits, labels):
    z_loss = torch.square(torch.logsumexp(logits, dim=-1)).mean()
    return F.cross_entropy(logits.transpose(-1, -2), labels, ignore_index=0) + 1e-3 * z_loss


EXPECTED = """\
lse
mean[y != 0](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
