"""Timm: an asymmetric focal loss of one label, with a power for each entry, smoothed.

Source: huggingface/pytorch-image-models, timm/loss/asymmetric_loss.py
Family: Each entry
"""

import torch

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))


def loss(inputs, target, gamma_pos=1, gamma_neg=4, eps=0.1):
    num_classes = inputs.size()[-1]
    log_preds = torch.log_softmax(inputs, dim=-1)
    targets_classes = torch.zeros_like(inputs).scatter_(1, target.long().unsqueeze(1), 1)
    anti_targets = 1 - targets_classes
    xs_pos = torch.exp(log_preds)
    xs_neg = 1 - xs_pos
    xs_pos = xs_pos * targets_classes
    xs_neg = xs_neg * anti_targets
    weights = torch.pow(1 - xs_pos - xs_neg, gamma_pos * targets_classes + gamma_neg * anti_targets)
    log_preds = log_preds * weights
    targets_classes = targets_classes.mul(1 - eps).add(eps / num_classes)
    return -targets_classes.mul(log_preds).sum(dim=-1).mean()


EXPECTED = """\
sum t2*log p*(1 - p*t - (1 - p)*t3)^t4
row_stats: max,sumexp
sharded: left as written
"""
