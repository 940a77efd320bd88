"""TRL: log-probabilities of chunks of tokens, upcast one at a time and put together.

Source: huggingface/trl, trl/trainer/utils.py
Family: Autocast, checkpoints, chunks
"""

import torch
import torch.nn.functional as F

N, V, CHUNK = 24, 64, 8


def inputs():
    return torch.randn(N, V).bfloat16().requires_grad_(), torch.randint(V, (N,)), torch.randn(N)


def loss(logits, ids, advantages):
    pieces = []
    for start in range(0, N, CHUNK):
        part = logits[start : start + CHUNK].float()
        logps = F.log_softmax(part, dim=-1)
        pieces.append(logps.gather(1, ids[start : start + CHUNK].unsqueeze(1)).squeeze(1))
    return -(torch.cat(pieces) * advantages).mean()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
