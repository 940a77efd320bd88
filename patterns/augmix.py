"""AugMix: cross entropy, and the Jensen-Shannon divergence of three views from their clamped mean.

Source: google-research/augmix, cifar.py
Family: Each entry
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
batchmean(sum xlogy(p, p) - p*log(clamp(0.3333*p + 0.3333*q + 0.3333*r, min=1e-07, max=1)))
batchmean(sum xlogy(q, q) - q*log(clamp(0.3333*p + 0.3333*q + 0.3333*r, min=1e-07, max=1)))
batchmean(sum xlogy(r, r) - r*log(clamp(0.3333*p + 0.3333*q + 0.3333*r, min=1e-07, max=1)))
row_stats: max,sumexp,pick
sharded: left as written
"""
