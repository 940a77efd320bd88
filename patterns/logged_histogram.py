"""Training logs: under no_grad a mean over the batch of a power of all probabilities, beside the loss.

Source: none named; what training scripts log of their predictions
Family: Kept beside
"""

import torch
import torch.nn.functional as F

N, V = 12, 48


def inputs():
    labels = torch.randint(V, (N,))
    labels[:3] = -100
    return torch.randn(N, V, requires_grad=True), labels


def loss(logits, labels):
    log_probs = F.log_softmax(logits, dim=-1)
    with torch.no_grad():
        spread = log_probs.exp().sqrt().mean(0)
    return F.nll_loss(log_probs, labels), spread


EXPECTED = """\
mean[y != -100](lse - pick(y))
kept: log_softmax of all classes [12x48], read by mean (spread = log_probs.exp().sqrt().mean(0))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
