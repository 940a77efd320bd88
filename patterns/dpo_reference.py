"""direct-preference-optimization: summed log-probabilities of the response, labels of the prompt set to 0.

Source: eric-mitchell/direct-preference-optimization, trainers.py
Family: Preferences
"""

import torch
import torch.nn.functional as F

B, S, V = 4, 7, 64


def inputs():
    labels = torch.randint(V, (B, S))
    labels[:, :3] = -100
    return torch.randn(B, S, V, requires_grad=True), labels, -20 * torch.rand(B)


def batch_logps(logits, labels):
    labels = labels[:, 1:].clone()
    logits = logits[:, :-1, :]
    mask = labels != -100
    labels[labels == -100] = 0
    picked = torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    return (picked * mask).sum(-1)


def loss(logits, labels, reference, beta=0.1):
    logps = batch_logps(logits, labels)
    chosen, rejected = logps.chunk(2)
    ref_chosen, ref_rejected = reference.chunk(2)
    margin = (chosen - rejected) - (ref_chosen - ref_rejected)
    losses = -F.logsigmoid(beta * margin)
    rewards = beta * (logps - reference).detach()
    return losses.mean(), rewards


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
