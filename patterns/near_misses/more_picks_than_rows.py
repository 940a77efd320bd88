"""Ranking of triples: of few rows many elements each, picked by rows that are repeated and columns.

Source: none; a sampled ranking loss over all entities
Family: Look-alikes
"""

import torch

N, V, K = 16, 48, 20


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N, K))


def loss(scores, entities):
    log_probs = scores.log_softmax(-1)
    rows = torch.arange(N).repeat_interleave(K)
    return -log_probs[rows, entities.reshape(-1)].mean()


EXPECTED = """\
NOT_UNDERSTOOD: The result of log_softmax goes into getitem (return -log_probs[rows,
    entities.reshape(-1)].mean()). It picks more elements than there are rows, one of which would be
    read for each. If this is a cross entropy, write this step in one of the spellings that the README
    lists; if not, it runs as written.
"""
