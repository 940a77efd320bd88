"""Word language model: the model returns the log-probabilities that its loss is taken from.

Source: pytorch/examples, word_language_model/model.py
Family: Kept beside
"""

import torch
import torch.nn.functional as F

N, V, D = 16, 48, 12


def inputs():
    return (
        torch.randn(N, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        torch.randint(V, (N,)),
    )


def loss(hidden, weight, targets):
    output = F.log_softmax(F.linear(hidden, weight), dim=1)
    return F.nll_loss(output, targets), output


EXPECTED = """\
mean[y != -100](lse - pick(y))
kept: log_softmax of all classes [16x48], returned
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
