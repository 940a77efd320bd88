"""verl: log-probability as minus a per-token cross entropy, in a clipped PPO objective.

Source: volcengine/verl, verl/utils/torch_functional.py and verl/trainer/ppo/core_algos.py
Family: Policy gradients
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    mask = (torch.arange(S)[None] < torch.tensor([[6], [8]])).float()
    old = -4 - torch.rand(B, S)
    return torch.randn(B, S, V, requires_grad=True), torch.randint(V, (B, S)), old, torch.randn(B, S), mask


def logprobs_from_logits(logits, labels):
    rows = -F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none")
    return rows.view(*labels.shape)


def loss(logits, responses, old_log_prob, advantages, mask, clip=0.2):
    log_prob = logprobs_from_logits(logits, responses)
    ratio = torch.exp(torch.clamp(log_prob - old_log_prob, min=-20.0, max=20.0))
    unclipped, clipped = -advantages * ratio, -advantages * torch.clamp(ratio, 1 - clip, 1 + clip)
    values = torch.maximum(unclipped, clipped)
    return (values * mask).sum() / (mask.sum() + 1e-8)


EXPECTED = """\
[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
