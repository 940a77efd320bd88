"""mdistiller: decoupled distillation, the label's probability and that over all other classes apart.

Source: megvii-research/mdistiller, mdistiller/distillers/DKD.py
Family: KL divergence
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), 3 * torch.randn(N, V), torch.randint(V, (N,))


def cat_mask(t, mask1, mask2):
    t1 = (t * mask1).sum(dim=1, keepdims=True)
    t2 = (t * mask2).sum(1, keepdims=True)
    return torch.cat([t1, t2], dim=1)


def loss(student, teacher, target, temperature=4.0):
    gt_mask = torch.zeros_like(student).scatter_(1, target.unsqueeze(1), 1).bool()
    other_mask = torch.ones_like(student).scatter_(1, target.unsqueeze(1), 0).bool()
    pred_student = cat_mask(F.softmax(student / temperature, dim=1), gt_mask, other_mask)
    pred_teacher = cat_mask(F.softmax(teacher / temperature, dim=1), gt_mask, other_mask)
    tckd = F.kl_div(torch.log(pred_student), pred_teacher, reduction="sum") * temperature**2 / target.shape[0]
    others_teacher = F.softmax(teacher / temperature - 1000.0 * gt_mask, dim=1)
    others_student = F.log_softmax(student / temperature - 1000.0 * gt_mask, dim=1)
    nckd = F.kl_div(others_student, others_teacher, reduction="sum") * temperature**2 / target.shape[0]
    return F.cross_entropy(student, target) + tckd + 8.0 * nckd


EXPECTED = """\
exp(pick(y) - lse)
mean_p(q)
row_stats: max,sumexp,pick,expdot:0
sharded: all_gather [4, N]
exp(pick(y) - lse)
mean_p(q)
row_stats: max,sumexp,pick,expdot:0
sharded: all_gather [4, N]
sum(sum q*(log q - log p), targets constant)
row_stats: max,sumexp
sharded: as a loss of one side
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
