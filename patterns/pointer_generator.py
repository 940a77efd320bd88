"""Pointer-generator network: the label's probability, by the vocabulary and by attention to the source.

Source: abisee/pointer-generator, model.py, as PyTorch ports have it
Family: Log-probabilities
"""

import torch
import torch.nn.functional as F

N, V, WORDS, UNKNOWN = 12, 48, 9, 3


def inputs():
    logits, attention = torch.randn(N, V, requires_grad=True), torch.randn(N, WORDS, requires_grad=True)
    source = torch.randint(V + UNKNOWN, (N, WORDS))
    target = torch.where(torch.arange(N) % 2 == 0, source[:, 0], torch.randint(V, (N,)))
    return logits, attention, torch.randn(N, 1, requires_grad=True), source, target, torch.rand(N)


def loss(logits, attention, gate, source, target, step_mask):
    p_gen = torch.sigmoid(gate)
    vocab_dist = p_gen * F.softmax(logits, dim=1)
    attn_dist = (1 - p_gen) * F.softmax(attention, dim=1)
    extended = torch.cat([vocab_dist, torch.zeros(N, UNKNOWN)], 1)
    final_dist = extended.scatter_add(1, source, attn_dist)
    gold_probs = torch.gather(final_dist, 1, target.unsqueeze(1)).squeeze()
    return (-torch.log(gold_probs + 1e-12) * step_mask).sum() / step_mask.sum()


EXPECTED = """\
r*exp(pick(y) - lse)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
