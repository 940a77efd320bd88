"""DL4MT: probabilities flattened, the word of each row indexed by its place among those of all rows.

Source: nyu-dl/dl4mt-tutorial, session2/nmt.py
Family: By hand
"""

import torch
import torch.nn.functional as F

S, B, V = 6, 4, 64


def inputs():
    mask = torch.ones(S, B)
    mask[4:, 1:] = 0.0
    return (2 * torch.randn(S, B, V)).requires_grad_(), torch.randint(V, (S, B)), mask


def loss(logits, words, mask):
    probs = F.softmax(logits.view(S * B, V), dim=-1)
    words_flat = words.flatten()
    words_flat_idx = torch.arange(words_flat.shape[0], device=words.device) * V + words_flat
    cost = -torch.log(probs.flatten()[words_flat_idx])
    cost = cost.view(S, B)
    return (cost * mask).sum(0).mean()


EXPECTED = """\
lse - pick(y)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
