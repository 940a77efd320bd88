"""A slip: Gumbel noise on the normaliser, and none on the logit that was chosen.

Source: none; what a refactoring leaves behind
Family: Look-alikes
"""

import torch

N, V = 16, 48


def inputs():
    noise = -torch.log(-torch.log(torch.rand(N, V)))
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,)), noise


def loss(logits, labels, noise):
    return ((logits + noise).logsumexp(-1) - logits.gather(-1, labels[:, None]).squeeze(-1)).mean()


EXPECTED = """\
NOT_UNDERSTOOD: The result of logsumexp goes into sub (return ((logits + noise).logsumexp(-1) -
    logits.gather(-1, labels[:, None]).squeeze(-1)).mean()). It joins values of different logits. If
    this is a cross entropy, write this step in one of the spellings that the README lists; if not, it
    runs as written.
"""
