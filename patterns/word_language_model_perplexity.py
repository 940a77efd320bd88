"""PyTorch examples: nll of log-probabilities over the vocabulary, and its exponential.

Source: pytorch/examples, word_language_model/main.py
Family: Entropy and accuracy
"""

import torch
import torch.nn.functional as F

S, B, V = 6, 3, 64


def inputs():
    return torch.randn(S, B, V, requires_grad=True), torch.randint(V, (S * B,))


def loss(decoded, targets):
    log_probs = F.log_softmax(decoded.view(-1, V), dim=1)
    value = F.nll_loss(log_probs, targets)
    return value, torch.exp(value)


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
