"""Mixture of softmaxes: its log-probabilities are returned beside the loss.

Source: zihangdai/mos, model.py
Family: Log-probabilities
"""

import torch
import torch.nn.functional as F

N, V, D, EXPERTS = 8, 48, 12, 3


def inputs():
    latent = torch.randn(N, EXPERTS, D, requires_grad=True)
    gate = torch.softmax(torch.randn(N, EXPERTS), -1).requires_grad_()
    return latent, gate, torch.randn(V, D, requires_grad=True), torch.randint(V, (N,))


def loss(latent, gate, weight, targets):
    logits = F.linear(latent.view(-1, D), weight)
    probs = F.softmax(logits, dim=-1).view(-1, EXPERTS, V)
    probs = (probs * gate.unsqueeze(2).expand_as(probs)).sum(1)
    log_probs = torch.log(probs.add_(1e-8))
    return F.nll_loss(log_probs, targets), log_probs


EXPECTED = """\
exp(pick(y) - lse)
kept: view of all classes [8x3x48], read by mul (probs = (probs *
    gate.unsqueeze(2).expand_as(probs)).sum(1))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
