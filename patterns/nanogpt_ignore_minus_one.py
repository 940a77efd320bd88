"""nanoGPT: flattened logits, padding marked by -1.

Source: karpathy/nanoGPT, model.py
Family: Cross entropy
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 65


def inputs():
    logits = (3 * torch.randn(B, S, V)).requires_grad_()
    targets = torch.randint(V, (B, S))
    targets[1, 4:] = -1
    return logits, targets


def loss(logits, targets):
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


EXPECTED = """\
mean[y != -1](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
