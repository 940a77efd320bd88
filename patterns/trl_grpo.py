"""TRL: GRPO with the ratio exp(lp - lp.detach()) and the k3 estimate of the KL to a reference.

Source: huggingface/trl, trl/trainer/grpo_trainer.py
Family: Policy gradients
"""

import torch

B, S, V = 2, 9, 64


def inputs():
    logits = torch.randn(B, S, V, requires_grad=True)
    ids = torch.randint(V, (B, S))
    mask = torch.arange(S)[None] < torch.tensor([[5], [8]])
    return logits, ids, mask, torch.randn(B), -4 - torch.rand(B, S - 1)


def loss(logits, ids, mask, advantages, ref_logps, beta=0.04):
    logits, ids, mask = logits[:, :-1], ids[:, 1:], mask[:, 1:].float()
    logps = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    gap = ref_logps - logps
    kl = torch.exp(gap) - gap - 1
    per_token = -torch.exp(logps - logps.detach()) * advantages[:, None] + beta * kl
    return ((per_token * mask).sum(-1) / mask.sum(-1)).mean()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
