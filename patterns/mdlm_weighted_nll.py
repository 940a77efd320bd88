"""MDLM: log-probabilities gathered with keepdim, a weight for each sequence from its noise level.

Source: kuleshov-group/mdlm, diffusion.py
Family: Masks and weights
"""

import torch

B, S, V = 3, 6, 64


def inputs():
    logits, sigma = 2 * torch.randn(B, S, V), torch.rand(B) + 0.1
    return logits.requires_grad_(), torch.randint(V, (B, S)), sigma, torch.ones(B, S).triu()


def loss(logits, x0, sigma, attention_mask):
    log_p = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    log_p_theta = torch.gather(log_p, dim=-1, index=x0[:, :, None]).squeeze(-1)
    per_token = -log_p_theta * (sigma / torch.expm1(sigma))[:, None]
    return (per_token * attention_mask).sum() / attention_mask.sum()


EXPECTED = """\
lse - pick(y)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
