"""torchtitan: batch and sequence flattened, upcast in the call.

Source: pytorch/torchtitan, torchtitan/components/loss.py
Family: Cross entropy
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    return torch.randn(B, S, V, dtype=torch.bfloat16).requires_grad_(), torch.randint(V, (B, S))


def loss(pred, labels):
    return F.cross_entropy(pred.flatten(0, 1).float(), labels.flatten(0, 1))


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
