"""NeMo AutoModel: a mask written into the labels, the sum over a count of all label tokens.

Source: NVIDIA-NeMo/Automodel, nemo_automodel/components/loss/masked_ce.py
Family: Masks and weights
"""

import torch
import torch.nn.functional as F

N, V = 16, 64


def inputs():
    logits = (3 * torch.randn(N, V)).bfloat16().requires_grad_()
    mask = torch.arange(N) % 4
    return logits, torch.randint(V, (N,)), mask, 12


def loss(logits, labels, mask, num_label_tokens):
    labels = labels.clone()
    labels.masked_fill_(mask.view(-1) == 0, -100)
    return F.cross_entropy(logits.float(), labels, reduction="sum") / num_label_tokens


EXPECTED = """\
sum[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
