"""Nearest rivals: the label's log-probability taken from all, of which the largest few have a margin.

Source: none named; ranking losses over the hardest negatives
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))


def loss(scores, labels):
    log_probs = F.log_softmax(scores, dim=-1)
    own = log_probs.gather(1, labels[:, None])
    rivals = (log_probs - own + 0.1).relu().topk(5).values
    return rivals.mean() - own.mean()


EXPECTED = """\
LOGITS_ESCAPE: The log_softmax of all classes [16x48] is also used by relu (rivals = (log_probs -
    own + 0.1).relu().topk(5).values). Compute the loss from the logits, apart from the
    log-probabilities that you keep.
"""
