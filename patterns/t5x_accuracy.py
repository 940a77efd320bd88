"""T5X: loss, squared normaliser and accuracy of one row of logits, each weighted per token.

Source: google-research/t5x, t5x/models.py and t5x/losses.py
Family: Several losses
"""

import torch

B, S, V = 2, 8, 64


def inputs():
    weights = (torch.arange(S)[None] < torch.tensor([[5], [8]])).float()
    return torch.randn(B, S, V, requires_grad=True), torch.randint(V, (B, S)), weights


def loss(logits, targets, weights, z_loss=1e-4):
    log_z = torch.logsumexp(logits, dim=-1, keepdim=True)
    log_softmax = logits - log_z
    one_hot = torch.nn.functional.one_hot(targets, V).to(logits.dtype)
    nll = -(one_hot * log_softmax).sum(dim=-1)
    z_term = z_loss * log_z.squeeze(-1) ** 2
    correct = (logits.argmax(dim=-1) == targets) * weights
    return ((nll + z_term) * weights).sum() / weights.sum(), (z_term * weights).sum(), correct.sum()


EXPECTED = """\
lse - pick(y)
lse
argmax
row_stats: max,sumexp,pick,argmax
sharded: all_gather [4, N]
"""
