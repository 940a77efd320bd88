"""mdistiller: Hinton's distillation, KL summed over classes and averaged over images.

Source: megvii-research/mdistiller, mdistiller/distillers/KD.py
Family: KL divergence
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randn(N, V), torch.randint(V, (N,))


def loss(student, teacher, target, temperature=4.0):
    log_pred = F.log_softmax(student / temperature, dim=1)
    pred_teacher = F.softmax(teacher / temperature, dim=1)
    kd = F.kl_div(log_pred, pred_teacher, reduction="none").sum(1).mean() * temperature**2
    return 0.1 * F.cross_entropy(student, target) + 0.9 * kd


EXPECTED = """\
sum q*(log q - log p), targets constant
row_stats: max,sumexp
sharded: as a loss of one side
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
