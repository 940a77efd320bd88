"""HALOs: KTO, sigmoid of the log-ratio against a batch estimate of the KL that carries no gradient.

Source: ContextualAI/HALOs, train/trainers.py
Family: Preferences
"""

import torch
import torch.nn.functional as F

B, S, V = 4, 7, 64


def inputs():
    labels = torch.randint(V, (B, S))
    labels[:, :3] = -100
    policy, mismatched = torch.randn(B, S, V, requires_grad=True), torch.randn(B, S, V)
    desirable = torch.tensor([True, False, True, True])
    return policy, mismatched, labels, desirable, -12 - torch.rand(B), -12 - torch.rand(B)


def sequence_logps(logits, labels):
    labels = labels[:, 1:]
    mask = labels.ne(-100)
    safe = labels.masked_fill(~mask, 0)
    logps = F.log_softmax(logits[:, :-1].float(), dim=-1)
    return (logps.gather(2, safe[:, :, None]).squeeze(2) * mask).sum(-1)


def loss(policy, mismatched, labels, desirable, reference, reference_kl, beta=0.1):
    with torch.no_grad():
        kl = (sequence_logps(mismatched, labels) - reference_kl).mean().clamp(min=0)
    gap = sequence_logps(policy, labels) - reference
    chosen, rejected = 1 - torch.sigmoid(beta * (gap - kl)), 1 - torch.sigmoid(beta * (kl - gap))
    return torch.where(desirable, chosen, 1.33 * rejected).mean()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
