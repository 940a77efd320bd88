"""Keras on torch: log_softmax and a one-hot target, given and taken along an axis.

Source: keras-team/keras, keras/src/backend/torch/nn.py
Family: Log-probabilities
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 48


def inputs():
    return (2 * torch.randn(B, S, V)).requires_grad_(), torch.randint(V, (B, S, 1))


def loss(output, target, axis=-1):
    target = target.squeeze(-1).to(torch.int64)
    log_prob = F.log_softmax(output, dim=axis)
    hot = F.one_hot(target, output.shape[axis]).to(output.dtype)
    return -torch.sum(hot * log_prob, dim=axis)


EXPECTED = """\
lse - pick(y)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
