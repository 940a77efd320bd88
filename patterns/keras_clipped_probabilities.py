"""Keras: probabilities scaled to sum to one and clipped, before the logarithm.

Source: keras-team/keras, keras/src/backend/torch/nn.py
Family: Each entry
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return (2 * torch.randn(N, V)).requires_grad_(), torch.randint(V, (N,))


def loss(scores, labels, epsilon=1e-7):
    output = F.softmax(scores, dim=-1)
    output = output / torch.sum(output, dim=-1, keepdim=True)
    output = torch.clip(output, epsilon, 1.0 - epsilon)
    return -torch.sum(F.one_hot(labels, V) * torch.log(output), dim=-1).mean()


EXPECTED = """\
sum t*log(clamp(p, min=1e-07, max=1))
row_stats: max,sumexp
sharded: left as written
"""
