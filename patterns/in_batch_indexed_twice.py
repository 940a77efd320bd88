"""In-batch negatives: the pair of row i stands in column i, indexed by the same range twice.

Source: none; how contrastive losses are often written without a diagonal
Family: Contrastive
"""

import torch
import torch.nn.functional as F

N, D = 48, 8


def inputs():
    return torch.randn(N, D, requires_grad=True), torch.randn(N, D, requires_grad=True)


def loss(queries, documents, temperature=0.5):
    log_probs = F.log_softmax(queries @ documents.T / temperature, dim=1)
    row = torch.arange(N, device=queries.device)
    return -log_probs[row, row].mean()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
