"""PyText: logits raised by a cost in all classes but the label's, under a multi-class hinge.

Source: facebookresearch/pytext, pytext/loss/structured_loss.py
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

B, T, V = 2, 8, 48


def inputs():
    return torch.randn(B, T, V, requires_grad=True), torch.randint(V, (B, T))


def loss(logits, targets, cost_scale=1.0):
    cost = cost_scale * torch.ones_like(logits)
    cost.scatter_(2, targets.unsqueeze(2), 0.0)
    raised = logits.clone() + cost
    return F.multi_margin_loss(raised.view(-1, V), targets.view(-1))


EXPECTED = """\
nothing to fuse
"""
