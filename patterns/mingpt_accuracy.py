"""transformers, Trainer metrics: accuracy over the tokens that count, from argmax of the same logits.

Source: huggingface/transformers, examples/pytorch/language-modeling/run_mlm.py
Family: Entropy and accuracy
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    labels = torch.full((B, S), -100)
    labels[:, ::3] = torch.randint(V, (B, 3))
    return torch.randn(B, S, V, requires_grad=True), labels


def loss(logits, labels):
    value = F.cross_entropy(logits.view(-1, V), labels.view(-1))
    predictions = logits.detach().argmax(dim=-1)
    mask = labels != -100
    accuracy = ((predictions == labels) & mask).float().sum() / mask.sum()
    return value, accuracy, torch.exp(value.detach())


EXPECTED = """\
mean[y != -100](lse - pick(y))
argmax
row_stats: max,sumexp,pick,argmax
sharded: all_gather [4, N]
"""
