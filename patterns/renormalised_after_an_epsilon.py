"""By hand: soft labels against probabilities that an epsilon raised and that were scaled to one again.

Source: none named; a guard that people write
Family: Each entry
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
0.001*V + 1
sum t*log(p/n + 0.001*1/n)
row_stats: max,sumexp
sharded: left as written
"""
