"""OpenNMT-py: a row of eps/(V - 2) with padding 0, repeated, scattered into, KLDivLoss summed.

Source: OpenNMT/OpenNMT-py, onmt/utils/loss.py
Family: Label smoothing
"""

import torch
import torch.nn.functional as F

N, V, PAD = 16, 64, 1


def inputs():
    target = torch.randint(2, V, (N,))
    target[10:13] = PAD
    return (3 * torch.randn(N, V)).requires_grad_(), target


def loss(scores, target, label_smoothing=0.1):
    log_probs = F.log_softmax(scores, dim=-1)
    row = torch.full((V,), label_smoothing / (V - 2))
    row[PAD] = 0
    model_prob = row.unsqueeze(0).repeat(target.size(0), 1)
    model_prob.scatter_(1, target.unsqueeze(1), 1.0 - label_smoothing)
    model_prob.masked_fill_((target == PAD).unsqueeze(1), 0)
    return F.kl_div(log_probs, model_prob, reduction="sum")


EXPECTED = """\
sum(lse*mass(q) + mass(q2) - dot(q))
row_stats: max,sumexp,dot:0,mass:0
sharded: all_gather [4, N]
"""
