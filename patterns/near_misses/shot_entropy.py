"""SHOT: entropy with an epsilon inside the logarithm, and that of the mean prediction.

Source: tim-learn/SHOT, object/loss.py and object/image_target.py
Family: Look-alikes
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
LOGITS_ESCAPE: The softmax of all classes [16x48] is also used by mean (mean = probs.mean(dim=0)).
    Compute the loss from the logits, apart from the log-probabilities that you keep.
"""
