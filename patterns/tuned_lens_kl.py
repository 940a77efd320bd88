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
sum q*(log q - log p), targets constant
row_stats: max,sumexp
sharded: as a loss of one side
"""
