"""Masked vocabulary: products of which a mask leaves entries out, whatever the logits are there.

Source: a form of jongwooko/distillm, distillm/losses.py, with the mask of a shared vocabulary
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randn(N, V), torch.rand(N, V) > 0.5


def loss(logits, teacher_logits, shared):
    products = F.softmax(teacher_logits, -1) * F.log_softmax(logits, -1)
    return -products.masked_fill(~shared, 0).sum(-1).mean()


EXPECTED = """\
NOT_UNDERSTOOD: The result of log_softmax goes into masked_fill (return
    -products.masked_fill(~shared, 0).sum(-1).mean()). It leaves entries of the log-probabilities out,
    which may be infinite there: sums of a row can tell only where the mask has torch.isinf of the
    logits too. If this is a cross entropy, write this step in one of the spellings that the README
    lists; if not, it runs as written.
"""
