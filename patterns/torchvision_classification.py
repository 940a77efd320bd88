"""torchvision references: smoothed cross entropy, and top-1 accuracy by topk under inference.

Source: pytorch/vision, references/classification/train.py and utils.py
Family: Images
"""

import torch
from torch import nn

N, V, D = 16, 96, 12
criterion = nn.CrossEntropyLoss(label_smoothing=0.1)


def inputs():
    return torch.randn(N, D), torch.randn(V, D, requires_grad=True), torch.randint(V, (N,))


def loss(features, weight, target):
    output = features @ weight.T
    value = criterion(output, target)
    with torch.no_grad():
        _, pred = output.topk(5, 1, True, True)
        correct = pred.t() == target[None]
        top5 = correct[:5].flatten().sum(dtype=torch.float32) * (100.0 / N)
    return value, top5


EXPECTED = """\
mean[y != -100](lse - 0.9*pick(y) - 0.1*sum/V)
row_stats: max,sumexp,pick,sum
sharded: all_gather [4, N]
"""
