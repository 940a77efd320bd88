"""Decoding beside training: the padding class is struck out of the logits, once the loss is taken.

Source: none; the plain loss keeps its log-probabilities, the fused one reads the logits again in the backward
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, V, D = 16, 48, 12


def inputs():
    return (
        torch.randn(N, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        torch.randint(V, (N,)),
    )


def loss(hidden, weight, labels):
    logits = hidden @ weight.t()
    mean = F.cross_entropy(logits, labels)
    with torch.no_grad():
        logits[:, 0] = float("-inf")
    return mean, logits.argmax(-1)


EXPECTED = """\
MUTATED: The logits are changed in place after this loss, whose backward reads them. Make the edit
    out of place, or move it before or after the whole loss.
"""
