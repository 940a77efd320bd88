"""torchvision, Inception v3: the auxiliary classifier at 0.4 of the main one.

Source: pytorch/tutorials, beginner_source/finetuning_torchvision_models_tutorial.py
Family: Several losses
"""

import torch
import torch.nn.functional as F

N, V, D = 16, 48, 8


def inputs():
    return (
        torch.randn(N, D),
        torch.randn(V, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        torch.randint(V, (N,)),
    )


def loss(features, weight, aux_weight, labels):
    outputs, aux_outputs = F.linear(features, weight), F.linear(features.tanh(), aux_weight)
    value = F.cross_entropy(outputs, labels) + 0.4 * F.cross_entropy(aux_outputs, labels)
    _, preds = torch.max(outputs, 1)
    return value, torch.sum(preds == labels.detach())


EXPECTED = """\
mean[y != -100](lse - pick(y))
argmax
row_stats: max,sumexp,pick,argmax
sharded: all_gather [4, N]
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
