"""gemma_pytorch: matmul with the transposed embedding, a bias added, capped in place.

Source: google/gemma_pytorch, gemma/model.py
Family: Heads
"""

import torch

N, D, V = 16, 4, 64


def inputs():
    h, embedding = torch.randn(N, D).requires_grad_(), (8 * torch.randn(V, D)).requires_grad_()
    return h, embedding, torch.randn(V).requires_grad_(), torch.randint(V, (N,))


def loss(hidden_states, embedding, embedding_bias, labels, cap=30.0):
    logits = torch.matmul(hidden_states, embedding.t())
    logits = logits + embedding_bias
    logits = torch.tanh(logits / cap) * cap
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float)
    return -torch.gather(log_probs, -1, labels.unsqueeze(-1)).mean()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
