"""SupCon: each positive against itself and the negatives alone, the maximum of a row taken off by hand.

Source: none named; supervised contrastive learning with the other positives left out of the normaliser
Family: Contrastive
"""

import torch
import torch.nn.functional as F

N, D = 48, 16


def inputs():
    return torch.randn(N, D, requires_grad=True), torch.randint(4, (N,))


def loss(features, labels, temperature=0.2):
    features = F.normalize(features, dim=1)
    same = labels[:, None] == labels[None, :]
    positives = (same & ~torch.eye(N, dtype=torch.bool, device=labels.device)).float()
    logits = features @ features.detach().t() / temperature
    logits = logits - logits.max(dim=1, keepdim=True)[0].detach()
    negatives = (torch.exp(logits) * ~same).sum(1, keepdim=True)
    log_prob = logits - torch.log(negatives + torch.exp(logits))
    return -((positives * log_prob).sum(1) / positives.sum(1).clamp(min=1)).mean()


EXPECTED = """\
mean_p(q)*exp(lse - max)
max
sum t*(z - c - log(n + exp(z - c)))
row_stats: max,sumexp,expdot:0
sharded: left as written
"""
