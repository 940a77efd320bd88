"""CPC: the diagonal of log-softmaxed scores, summed.

Source: jefflai108/Contrastive-Predictive-Coding-PyTorch, src/model/model.py
Family: Contrastive
"""

import torch

T, B, D = 3, 24, 8


def inputs():
    return torch.randn(T, B, D, requires_grad=True), torch.randn(T, B, D, requires_grad=True)


def loss(encodings, predictions):
    nce = 0
    lsoftmax = torch.nn.LogSoftmax(dim=1)
    for i in range(T):
        total = torch.mm(encodings[i], torch.transpose(predictions[i], 0, 1))
        nce = nce + torch.sum(torch.diag(lsoftmax(total)))
    return nce / (-1.0 * B * T)


EXPECTED = """\
pick(i) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
pick(i) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
pick(i) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
