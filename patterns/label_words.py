"""LM-BFF: log-probabilities of the words that stand for the labels, and a loss over these.

Source: princeton-nlp/LM-BFF, src/models.py
Family: Log-probabilities
"""

import torch
import torch.nn.functional as F

B, V = 12, 64


def inputs():
    return torch.randn(B, V, requires_grad=True), torch.tensor([5, 17, 40])[None].expand(B, 3).contiguous()


def loss(mask_logits, label_word_ids):
    log_probs = F.log_softmax(mask_logits, dim=-1)
    return log_probs.gather(-1, label_word_ids).sum(-1)


EXPECTED = """\
pick(y) - lse, pick(y2) - lse, pick(y3) - lse
row_stats: max,sumexp,pick,pick,pick
sharded: all_gather [5, N]
"""
