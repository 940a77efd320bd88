"""SimPO: length-normalised log-probabilities without a reference, a target margin, smoothed labels.

Source: princeton-nlp/SimPO, scripts/simpo_trainer.py
Family: Preferences
"""

import torch
import torch.nn.functional as F

B, S, V = 4, 7, 64


def inputs():
    labels = torch.randint(V, (B, S))
    labels[:, :2] = -100
    labels[1, 5:] = -100
    return torch.randn(B, S, V).bfloat16().requires_grad_(), labels


def loss(logits, labels, beta=2.0, gamma=0.5, smoothing=0.1):
    labels, logits = labels[:, 1:].clone(), logits[:, :-1, :].to(torch.float32)
    mask = labels != -100
    labels[labels == -100] = 0
    per_token = torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    logps = (per_token * mask).sum(-1) / mask.sum(-1)
    margin = logps[: B // 2] - logps[B // 2 :] - gamma
    losses = -F.logsigmoid(beta * margin) * (1 - smoothing) - F.logsigmoid(-beta * margin) * smoothing
    return losses.mean()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
