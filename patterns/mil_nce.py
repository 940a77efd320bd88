"""MIL-NCE: several positives, so one logsumexp over them less another over all candidates, which is fused.

Source: antoine77340/MIL-NCE_HowTo100M, loss.py
Family: Normalisers
"""

import torch

B, K, D = 8, 3, 12  # K captions for each clip


def inputs():
    return torch.randn(B, D, requires_grad=True), torch.randn(B * K, D, requires_grad=True)


def loss(video, text):
    x = (video @ text.t()).view(B, B, K)
    positives = torch.logsumexp((x * torch.eye(B, device=x.device)[:, :, None]).sum(dim=1), dim=1)
    candidates = torch.logsumexp(torch.cat([x, x.permute(1, 0, 2)], dim=1).view(B, -1), dim=1)
    return (candidates - positives).mean()


EXPECTED = """\
lse
row_stats: max,sumexp
sharded: all_gather [2, N]
"""
