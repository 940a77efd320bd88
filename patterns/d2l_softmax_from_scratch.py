"""Dive into Deep Learning: softmax from scratch, indexed, then the log.

Source: d2l-ai/d2l-en, chapter_linear-classification/softmax-regression-scratch.md
Family: By hand
"""

import torch

N, V = 16, 48


def inputs():
    return torch.randn(N, V).requires_grad_(), torch.randint(V, (N,))


def softmax(x):
    e = torch.exp(x)
    return e / e.sum(1, keepdims=True)


def loss(logits, y):
    y_hat = softmax(logits)
    return -torch.log(y_hat[list(range(len(y_hat))), y]).mean()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
