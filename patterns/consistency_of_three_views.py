"""Consistency of augmented views: the Jensen-Shannon divergence of three, from their mean probabilities.

Source: in the manner of google-research/augmix, cifar.py, without its clamp
Family: Several sides
"""

import torch
import torch.nn.functional as F

B, V = 4, 48


def inputs():
    return torch.randn(3 * B, V, requires_grad=True), torch.randint(V, (B,))


def loss(logits_all, targets):
    clean, first, second = torch.chunk(logits_all, 3)
    views = torch.stack([F.softmax(z, dim=-1) for z in (clean, first, second)])
    mixture = views.mean(dim=0).log()
    log_probs = [F.log_softmax(z, dim=-1) for z in (clean, first, second)]
    divergence = sum(F.kl_div(mixture, p, log_target=True, reduction="batchmean") for p in log_probs) / 3
    return F.cross_entropy(clean, targets) + 12 * divergence


EXPECTED = """\
mean[y != -100](lse - pick(y))
batchmean(sum 4*p*(log p - log m) + 4*q*(log q - log m) + 4*r*(log r - log m), m = 0.333333*p +
    0.333333*q + 0.333333*r)
row_stats: max,sumexp,pick
sharded: left as written
"""
