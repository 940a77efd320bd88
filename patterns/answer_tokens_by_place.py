"""Multiple choice by likelihood: log-probabilities at given sequences, places and tokens, in one index.

Source: none named; the scoring of answers in evaluations of language models
Family: Rows chosen after
"""

import torch

B, S, V = 4, 6, 48


def inputs():
    sequences, places = torch.randint(B, (10,)), torch.randint(S, (10,))
    return torch.randn(B, S, V, requires_grad=True), sequences, places, torch.randint(V, (10,))


def loss(logits, sequences, places, tokens):
    log_probs = torch.log_softmax(logits, dim=-1)
    scores = log_probs[sequences, places - 1, tokens]
    return -scores.mean(), scores


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
