"""A slip: rows are chosen of the scores alone, and stand beside the normalisers of others.

Source: none; lengths forgotten on one side
Family: Look-alikes
"""

import torch

N, V = 16, 48


def inputs():
    rows = torch.randint(N, (N,))
    return (2 * torch.randn(N, V)).requires_grad_(), torch.randint(V, (N,)), rows


def loss(logits, labels, rows):
    picked = logits[rows].gather(1, labels[:, None]).squeeze(1)
    return (torch.logsumexp(logits, -1) - picked).mean()


EXPECTED = """\
NOT_UNDERSTOOD: The result of logsumexp goes into sub (return (torch.logsumexp(logits, -1) -
    picked).mean()). It joins values of different logits. If this is a cross entropy, write this step in
    one of the spellings that the README lists; if not, it runs as written.
"""
