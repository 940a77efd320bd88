"""A slip: the classes outside the top k are struck out of the normaliser, but a label may be one of them.

Source: none; half of the top-k filter of ai4co/rl4co, rl4co/utils/decoding.py
Family: Look-alikes
"""

import torch

N, V, K = 16, 48, 8


def inputs():
    return (2 * torch.randn(N, V)).requires_grad_(), torch.randint(V, (N,))


def loss(logits, actions):
    outside = logits < logits.topk(K, dim=-1).values[:, -1:]
    kept = logits.masked_fill(outside, float("-inf"))
    return (kept.logsumexp(-1) - logits.gather(-1, actions[:, None]).squeeze(-1)).mean()


EXPECTED = """\
NOT_UNDERSTOOD: The result of logsumexp goes into sub (return (kept.logsumexp(-1) -
    logits.gather(-1, actions[:, None]).squeeze(-1)).mean()). It joins values of different logits. If
    this is a cross entropy, write this step in one of the spellings that the README lists; if not, it
    runs as written.
"""
