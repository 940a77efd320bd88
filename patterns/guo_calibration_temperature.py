"""temperature_scaling: logits divided by a parameter of one element, expanded.

Source: gpleiss/temperature_scaling, temperature_scaling.py
Family: Soft-cap, scale, bias
"""

import torch
from torch import nn

N, V = 16, 100


def inputs():
    logits, temperature = 3 * torch.randn(N, V), torch.tensor([1.5])
    return logits.requires_grad_(), temperature.requires_grad_(), torch.randint(V, (N,))


def loss(logits, temperature, labels):
    temperature = temperature.unsqueeze(1).expand(logits.size(0), logits.size(1))
    return nn.CrossEntropyLoss()(logits / temperature, labels)


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
