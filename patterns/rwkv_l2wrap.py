"""RWKV: a function of its own adds to the gradient of the largest logit of a row, and returns the loss.

Source: BlinkDL/RWKV-LM, RWKV-v5/src/model.py
Family: Several losses
"""

import torch
import torch.nn.functional as F

B, T, V = 2, 8, 48


def inputs():
    return torch.randn(B, T, V, requires_grad=True), torch.randint(V, (B, T))


class L2Wrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, y):
        ctx.save_for_backward(y)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_output):
        (y,) = ctx.saved_tensors
        factor = 1e-4 / (y.shape[0] * y.shape[1])
        largest, places = torch.max(y, -1, keepdim=True)
        gradient = torch.zeros_like(y)
        gradient.scatter_(-1, places, largest * factor)
        return grad_output, gradient


def loss(logits, targets):
    return L2Wrap.apply(F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1)), logits)


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
