"""PyTorch examples: log_softmax in the network, nll_loss, argmax of the log-probabilities with keepdim.

Source: pytorch/examples, mnist/main.py
Family: Entropy and accuracy
"""

import torch
import torch.nn.functional as F

N, V, D = 16, 48, 12


def inputs():
    weight, bias = torch.randn(V, D, requires_grad=True), torch.randn(V, requires_grad=True)
    return torch.randn(N, D), weight, bias, torch.randint(V, (N,))


def loss(x, weight, bias, target):
    output = F.log_softmax(F.linear(x, weight, bias), dim=1)
    value = F.nll_loss(output, target)
    pred = output.argmax(dim=1, keepdim=True)
    return value, pred.eq(target.view_as(pred)).sum()


EXPECTED = """\
mean[y != -100](lse - pick(y))
argmax
row_stats: max,sumexp,pick,argmax
sharded: all_gather [4, N]
"""
