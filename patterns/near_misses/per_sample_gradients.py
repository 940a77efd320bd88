"""Per-sample gradients: their norms, from the gradient of the loss of one sample under vmap.

Source: pytorch/tutorials, intermediate_source/per_sample_grads.py
Family: Look-alikes
"""

import torch
import torch.nn.functional as F
from torch.func import grad, vmap

N, V, D = 16, 48, 12


def inputs():
    return torch.randn(V, D, requires_grad=True), torch.randn(N, D), torch.randint(V, (N,))


def sample_loss(weight, sample, target):
    return F.cross_entropy(F.linear(sample.unsqueeze(0), weight), target.unsqueeze(0))


def loss(weight, samples, targets):
    gradients = vmap(grad(sample_loss), in_dims=(None, 0, 0))(weight, samples, targets)
    return gradients.square().sum(dim=(1, 2)).mean()


EXPECTED = """\
FUNCTION_TRANSFORM: The graph runs under a transform of torch.func, such as vmap. Compute the loss
    outside torch.func transforms.
"""
