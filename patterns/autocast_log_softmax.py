"""accelerate under autocast: log_softmax is upcast by autocast, gathered, averaged over a mask.

Source: huggingface/accelerate, src/accelerate/accelerator.py
Family: Autocast, checkpoints, chunks
"""

import torch

B, S, V, D = 2, 8, 64, 12


def inputs():
    mask = (torch.arange(S)[None] < torch.tensor([[5], [8]])).float()
    weight = (torch.randn(V, D) / 3).requires_grad_()
    return torch.randn(B, S, D, requires_grad=True), weight, torch.randint(V, (B, S)), mask


def loss(hidden, weight, ids, mask):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = hidden @ weight.T
        logps = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[..., None]).squeeze(-1)
    return -(logps * mask).sum() / mask.sum()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
