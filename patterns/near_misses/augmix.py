"""AugMix: cross entropy, and the Jensen-Shannon divergence of three views from their clamped mean.

Source: google-research/augmix, cifar.py
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

B, V = 8, 48


def inputs():
    return torch.randn(3 * B, V, requires_grad=True), torch.randint(V, (B,))


def loss(logits_all, targets):
    clean, first, second = torch.split(logits_all, B)
    views = [F.softmax(z, dim=1) for z in (clean, first, second)]
    mixture = torch.clamp(sum(views) / 3.0, 1e-7, 1).log()
    divergence = sum(F.kl_div(mixture, p, reduction="batchmean") for p in views) / 3.0
    return F.cross_entropy(clean, targets) + 12 * divergence


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
NOT_UNDERSTOOD: The result of softmax goes into kl_div (divergence = sum(F.kl_div(mixture, p,
    reduction="batchmean") for p in views) / 3.0). If this is a cross entropy, write this step in one of
    the spellings that the README lists; if not, it runs as written.
SOFT_TARGETS: The classes are weighed by add (mixture = torch.clamp(sum(views) / 3.0, 1e-7,
    1).log()) [8, 48], of which a gradient is wanted. Detach the targets if they are meant as constants;
    no gradient reaches them through the kernels.
"""
