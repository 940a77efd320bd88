"""A slip: the columns of all labels for every row, whose diagonal is forgotten.

Source: none; an index that lacks the rows
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))


def loss(scores, labels):
    return -F.log_softmax(scores, dim=1)[:, labels].mean()


EXPECTED = """\
NOT_UNDERSTOOD: The result of log_softmax goes into getitem (return -F.log_softmax(scores, dim=1)[:,
    labels].mean()). If this is a cross entropy, write this step in one of the spellings that the README
    lists; if not, it runs as written.
"""
