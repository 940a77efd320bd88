"""transformers, BERT: the decoder tied to the embeddings, with a bias; most labels ignored.

Source: huggingface/transformers, src/transformers/models/bert/modeling_bert.py
Family: Heads
"""

import torch
from torch import nn

B, S, D, V = 2, 8, 4, 64


def inputs():
    labels = torch.full((B, S), -100)
    labels[:, ::3] = torch.randint(V, (B, 3))
    h, embeddings = torch.randn(B, S, D).requires_grad_(), torch.randn(V, D).requires_grad_()
    return h, embeddings, torch.randn(V).requires_grad_(), labels


def loss(sequence_output, embeddings, bias, labels):
    scores = nn.functional.linear(sequence_output, embeddings) + bias
    return nn.CrossEntropyLoss()(scores.view(-1, V), labels.view(-1))


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
