"""verl: entropy with gradient as logsumexp minus the softmax-weighted logits.

Source: volcengine/verl, verl/utils/torch_functional.py
Family: Entropy and accuracy
"""

import torch

B, S, V = 2, 8, 64


def inputs():
    mask = (torch.arange(S)[None] < torch.tensor([[6], [8]])).float()
    return torch.randn(B, S, V, requires_grad=True), torch.randint(V, (B, S)), torch.randn(B, S), mask


def entropy_from_logits(logits):
    probs = torch.nn.functional.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - torch.sum(probs * logits, dim=-1)


def masked_mean(values, mask):
    return (values * mask).sum() / mask.sum()


def loss(logits, responses, advantages, mask, coefficient=0.001):
    logits = logits.div(1.0)
    logps = torch.log_softmax(logits, dim=-1).gather(dim=-1, index=responses.unsqueeze(-1)).squeeze(-1)
    policy = masked_mean(-logps * advantages, mask)
    return policy - coefficient * masked_mean(entropy_from_logits(logits), mask)


EXPECTED = """\
lse - pick(y)
lse - mean_p
row_stats: max,sumexp,pick,sumexpz
sharded: all_gather [4, N]
"""
