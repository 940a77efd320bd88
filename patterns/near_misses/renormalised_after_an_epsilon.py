"""By hand: soft labels against probabilities that an epsilon raised and that were scaled to one again.

Source: none named; a guard that people write
Family: Look-alikes
"""

import torch

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.softmax(torch.randn(N, V), -1)


def loss(logits, targets):
    probs = torch.softmax(logits, dim=-1) + 1e-3
    probs = probs / probs.sum(dim=-1, keepdim=True)
    return -(targets * torch.log(probs)).sum(dim=-1).mean()


EXPECTED = """\
EACH_ENTRY: The result of softmax goes into log (return -(targets *
    torch.log(probs)).sum(dim=-1).mean()), of which more than picked entries are needed. Each entry of a
    row is needed there by itself, so it runs as written.
"""
