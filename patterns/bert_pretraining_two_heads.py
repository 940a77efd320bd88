"""BERT: masked tokens over the vocabulary and the relation of two sentences, added.

Source: huggingface/transformers, src/transformers/models/bert/modeling_bert.py
Family: Several losses
"""

import torch
from torch import nn

B, S, V = 3, 6, 64


def inputs():
    labels = torch.full((B, S), -100)
    labels[:, ::2] = torch.randint(V, (B, 3))
    relation = torch.randn(B, 2, requires_grad=True)
    return torch.randn(B, S, V, requires_grad=True), relation, labels, torch.randint(2, (B,))


def loss(prediction_scores, seq_relationship_score, labels, next_sentence_label):
    loss_fct = nn.CrossEntropyLoss()
    masked_lm = loss_fct(prediction_scores.view(-1, V), labels.view(-1))
    next_sentence = loss_fct(seq_relationship_score.view(-1, 2), next_sentence_label.view(-1))
    return masked_lm + next_sentence


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
