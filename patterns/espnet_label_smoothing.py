"""ESPnet: a dense target of eps/(V - 1), KLDivLoss per element, ignored rows filled with 0.

Source: espnet/espnet, espnet/nets/pytorch_backend/transformer/label_smoothing_loss.py
Family: Label smoothing
"""

import torch
from torch import nn

B, S, V, IGNORE = 2, 8, 64, -1


def inputs():
    target = torch.randint(V, (B, S))
    target[1, 5:] = IGNORE
    return (3 * torch.randn(B, S, V)).requires_grad_(), target


def loss(x, target, smoothing=0.1):
    batch = x.size(0)
    x, target = x.view(-1, V), target.view(-1)
    with torch.no_grad():
        true_dist = x.clone().fill_(smoothing / (V - 1))
        ignore = target == IGNORE
        target = target.masked_fill(ignore, 0)
        true_dist.scatter_(1, target.unsqueeze(1), 1.0 - smoothing)
    kl = nn.KLDivLoss(reduction="none")(torch.log_softmax(x, dim=1), true_dist)
    return kl.masked_fill(ignore.unsqueeze(1), 0).sum() / batch


EXPECTED = """\
sum(0.0015873015873015873*V*lse*r + 0.8984126984126984*lse*r - 0.01023130130061203*V*r -
    0.08459316279143163*r - 0.8984126984126984*r*pick(y) - 0.0015873015873015873*r*sum)
row_stats: max,sumexp,pick,sum
sharded: all_gather [4, N]
"""
