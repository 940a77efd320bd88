"""Learned class weights: a parameter [V] multiplies the log-probability of the label.

Source: none; class weights that are trained beside the model
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return (
        (2 * torch.randn(N, V)).requires_grad_(),
        torch.zeros(V, requires_grad=True),
        torch.randint(V, (N,)),
    )


def loss(logits, log_weights, labels):
    weighted = F.softmax(log_weights, dim=0) * V * F.log_softmax(logits, dim=-1)
    return -weighted.gather(-1, labels[:, None]).mean()


EXPECTED = """\
NOT_UNDERSTOOD: The result of log_softmax goes into mul (weighted = F.softmax(log_weights, dim=0) *
    V * F.log_softmax(logits, dim=-1)). It joins values of different logits. If this is a cross entropy,
    write this step in one of the spellings that the README lists; if not, it runs as written.
"""
