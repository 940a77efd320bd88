"""TRL: IPO, the squared distance of a margin of mean log-probabilities from 1 / (2 beta).

Source: huggingface/trl, trl/trainer/dpo_trainer.py
Family: Preferences
"""

import torch

B, S, V = 4, 7, 64


def inputs():
    labels = torch.randint(V, (B, S))
    labels[:, :3] = -100
    return torch.randn(B, S, V, requires_grad=True), labels, -4 - torch.rand(B)


def loss(logits, labels, reference, beta=0.1):
    logits, labels = logits[:, :-1], labels[:, 1:]
    mask = labels != -100
    safe = torch.where(mask, labels, 0)
    picked = torch.gather(logits, -1, safe.unsqueeze(-1)).squeeze(-1)
    per_token = picked - logits.logsumexp(-1)
    per_token = torch.where(mask, per_token, 0.0)
    logps = per_token.sum(-1) / mask.sum(-1)
    gap = logps - reference
    return ((gap[: B // 2] - gap[B // 2 :] - 1 / (2 * beta)) ** 2).mean()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
