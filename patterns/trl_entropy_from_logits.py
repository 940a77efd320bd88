"""TRL: the entropy of each token, chunk by chunk, as minus the sum of exp(lp) lp.

Source: huggingface/trl, trl/trainer/utils.py
Family: Entropy and accuracy
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    return torch.randn(B, S, V, requires_grad=True), torch.randint(V, (B, S))


def loss(logits, ids, chunk_size=4):
    rows = logits.reshape(-1, V)
    picked = F.log_softmax(rows, dim=-1).gather(-1, ids.reshape(-1, 1)).squeeze(-1)
    pieces = []
    for chunk in rows.split(chunk_size, dim=0):
        logps = F.log_softmax(chunk, dim=-1)
        pieces.append(-(torch.exp(logps) * logps).sum(-1))
    entropy = torch.cat(pieces, dim=0).reshape(B, S)
    return -picked.mean() - 0.01 * entropy.mean()


EXPECTED = """\
pick(y) - lse
lse - mean_p
row_stats: max,sumexp,pick,sumexpz
sharded: all_gather [4, N]
"""
