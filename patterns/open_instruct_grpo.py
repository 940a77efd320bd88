"""open-instruct: a temperature with a guard, ratio to the old policy, k3 to the reference.

Source: allenai/open-instruct, open_instruct/grpo_fast.py
Family: Policy gradients
"""

import torch

B, S, V = 2, 9, 64


def inputs():
    mask = torch.arange(S - 1)[None] < torch.tensor([[5], [8]])
    old, ref = -4 - torch.rand(B, S - 1), -4 - torch.rand(B, S - 1)
    logits = torch.randn(B, S, V, requires_grad=True)
    return logits, torch.randint(V, (B, S)), old, ref, torch.randn(B, S - 1), mask


def loss(logits, ids, old_logps, ref_logps, advantages, mask, temperature=0.7, beta=0.05):
    logits = logits[:, :-1] / (temperature + 1e-7)
    logps = logits.log_softmax(dim=-1).gather(dim=-1, index=ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    ratio = torch.exp(logps - old_logps)
    policy = torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2))
    gap = (logps - ref_logps).clamp(-40.0, 40.0)
    kl = torch.expm1(-gap) + gap
    weights = mask / mask.sum(1, keepdim=True)
    return ((policy + beta * kl) * weights).sum(1).mean()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
