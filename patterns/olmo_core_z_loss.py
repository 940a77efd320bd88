"""OLMo-core: both terms as sums over the tokens that count, divided by a count given from outside.

Source: allenai/OLMo-core, src/olmo_core/nn/functional/cross_entropy_loss.py
Family: Z-loss
"""

import torch
import torch.nn.functional as F

N, V = 16, 64


def inputs():
    labels = torch.randint(V, (N,))
    labels[5:8] = -100
    return (2 * torch.randn(N, V)).bfloat16().requires_grad_(), labels, torch.tensor(13.0)


def loss(logits, labels, div_factor, ignore_index=-100, z_loss_multiplier=1e-4):
    logits = logits.float()
    ce = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    z_squared = logits.logsumexp(-1).pow(2)
    z_squared = (z_squared * (labels != ignore_index)).sum()
    return ce / div_factor, z_loss_multiplier * z_squared / div_factor


EXPECTED = """\
sum[y != -100](lse - pick(y))
lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
