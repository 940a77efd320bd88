"""Mean-variance loss: an age as the mean of a distribution over years, whose variance from it is small too.

Source: none named; the paper of Pan et al., beside a label distribution as in DLDL-v2
Family: Each entry
"""

import torch
import torch.nn.functional as F

N, V, EPSILON = 12, 48, 1e-12


def inputs():
    return torch.randn(N, V, requires_grad=True), 4 + 40 * torch.rand(N)


def loss(logits, age):
    years = torch.arange(V, dtype=logits.dtype, device=logits.device)
    target = torch.softmax(-((years[None, :] - age[:, None]) ** 2) / 8, dim=1)
    prob = F.softmax(logits, dim=1)
    kl = (target * (torch.log(target + EPSILON) - torch.log(prob + EPSILON))).sum(1)
    mean = (prob * years).sum(1)
    variance = (prob * (years[None, :] - mean[:, None]) ** 2).sum(1)
    return kl.mean() + 0.2 * F.mse_loss(mean, age) / 2 + 0.05 * variance.mean()


EXPECTED = """\
mean_p(w)
sum p*(log(p + 1e-12) - log(q + 1e-12))
sum p*(t - n)^2
row_stats: max,sumexp,expdot:0
sharded: left as written
"""
