"""timm: a target of on and off values made by scatter, against log-probabilities.

Source: huggingface/pytorch-image-models, timm/data/mixup.py and timm/loss/cross_entropy.py
Family: Label smoothing
"""

import torch

N, V = 16, 64


def inputs():
    return (3 * torch.randn(N, V)).requires_grad_(), torch.randint(V, (N,))


def loss(x, target, smoothing=0.1):
    off_value = smoothing / V
    on_value = 1.0 - smoothing + off_value
    dense = torch.full((N, V), off_value).scatter_(1, target.long().view(-1, 1), on_value)
    return torch.sum(-dense * torch.log_softmax(x, dim=-1), dim=-1).mean()


EXPECTED = """\
0.0015625*V*lse + 0.9*lse - 0.9*pick(y) - 0.0015625*sum
row_stats: max,sumexp,pick,sum
sharded: all_gather [4, N]
"""
