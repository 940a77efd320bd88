"""PaLM: 1e-4 log² Z inside the mean over tokens.

Source: google-research/t5x, t5x/losses.py, as ported to torch
Family: Z-loss
"""

import torch

B, S, V = 2, 8, 64


def inputs():
    return (2 * torch.randn(B, S, V)).requires_grad_(), torch.randint(V, (B, S))


def loss(logits, labels, z_weight=1e-4):
    log_z = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(-1, labels[..., None]).squeeze(-1)
    return (log_z - picked + z_weight * log_z**2).mean()


EXPECTED = """\
lse
lse - pick(y)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
