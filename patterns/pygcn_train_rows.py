"""PyGCN: log-probabilities of all nodes of a graph, the loss of those by whose numbers it is trained.

Source: tkipf/pygcn, pygcn/train.py
Family: Rows chosen after
"""

import torch
import torch.nn.functional as F

NODES, HIDDEN, CLASSES, TRAINED = 24, 8, 40, 10


def inputs():
    adj = torch.rand(NODES, NODES).softmax(-1)
    idx_train = torch.randint(NODES, (TRAINED,))  # some twice
    tensors = torch.randn(NODES, HIDDEN), torch.randn(HIDDEN, CLASSES)
    return *(t.requires_grad_() for t in tensors), adj, torch.randint(CLASSES, (NODES,)), idx_train


def model(x, weight, adj):
    return F.log_softmax(torch.mm(adj, torch.mm(x, weight)), dim=1)


def loss(x, weight, adj, labels, idx_train):
    output = model(x, weight, adj)
    return F.nll_loss(output[idx_train], labels[idx_train])


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
