"""SHOT: entropy with an epsilon inside the logarithm, and that of the mean prediction, of all rows.

Source: tim-learn/SHOT, object/loss.py and object/image_target.py
Family: Kept beside
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return ((2 * torch.randn(N, V)).requires_grad_(),)


def loss(outputs, eps=1e-5):
    probs = F.softmax(outputs, dim=1)
    entropy = (-probs * torch.log(probs + eps)).sum(dim=1).mean()
    mean = probs.mean(dim=0)
    return entropy + (mean * torch.log(mean + eps)).sum()


EXPECTED = """\
sum -p*log(p + 1e-05)
kept: softmax of all classes [16x48], read by mean (mean = probs.mean(dim=0))
row_stats: max,sumexp
sharded: left as written
"""
