"""Tuned lens: forward KL by hand to the model's own final log-probabilities.

Source: AlignmentResearch/tuned-lens, tuned_lens/scripts/train_loop.py
Family: KL divergence
"""

import torch

B, S, V = 2, 8, 64


def inputs():
    return torch.randn(B, S, V, requires_grad=True), torch.randn(B, S, V)


def loss(lens_logits, final_logits):
    labels = final_logits.log_softmax(dim=-1)
    preds = lens_logits.log_softmax(dim=-1)
    return torch.sum(labels.exp() * (labels - preds), dim=-1).mean()


EXPECTED = """\
lse*mass(q2) + mass(q, q2) - dot(q2)
row_stats: max,sumexp,dot:0,mass:0
sharded: all_gather [4, N]
"""
