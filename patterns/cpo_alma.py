"""ALMA: CPO, a preference term without a reference and a behaviour-cloning term on the chosen half.

Source: fe1ixxu/ALMA, utils/cpo_trainer.py
Family: Preferences
"""

import torch
import torch.nn.functional as F

B, S, V = 4, 7, 64


def inputs():
    labels = torch.randint(V, (B, S))
    labels[:, :2] = -100
    return torch.randn(B, S, V, requires_grad=True), labels


def loss(logits, labels, beta=0.1):
    chosen_logits, chosen_labels = logits[: B // 2], labels[: B // 2]
    nll = F.cross_entropy(
        chosen_logits[..., :-1, :].reshape(-1, V), chosen_labels[..., 1:].reshape(-1), ignore_index=-100
    )
    shifted, targets = logits[:, :-1, :], labels[:, 1:]
    mask = targets != -100
    picked = torch.gather(shifted.log_softmax(-1), 2, torch.where(mask, targets, 0).unsqueeze(2)).squeeze(2)
    logps = (picked * mask).sum(-1)
    return -F.logsigmoid(beta * (logps[: B // 2] - logps[B // 2 :])).mean() + nll


EXPECTED = """\
mean[y != -100](lse - pick(y))
pick(y2) - lse
row_stats: max,sumexp,pick,pick
sharded: all_gather [4, N]
"""
