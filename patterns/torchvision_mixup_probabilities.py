"""torchvision references: one-hot targets rolled and mixed, cross entropy to probabilities with smoothing.

Source: pytorch/vision, references/classification/transforms.py and train.py
Family: Soft targets
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))


def loss(output, labels, lam=0.7):
    target = F.one_hot(labels, num_classes=V).to(dtype=output.dtype)
    target = target.roll(1, 0).mul(1.0 - lam) + target.mul(lam)
    return F.cross_entropy(output, target, label_smoothing=0.1)


EXPECTED = """\
mean(0.1*lse + 0.9*lse*mass(q) - 0.9*dot(q) - 0.1*sum/V)
row_stats: max,sumexp,sum,dot:0,mass:0
sharded: all_gather [5, N]
"""
