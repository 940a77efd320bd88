"""LayerSkip: the loss at every exit by the same head, weighted, the weights normalised.

Source: facebookresearch/LayerSkip, self_speculation/llama_model_utils.py
Family: Several losses
"""

import torch
import torch.nn.functional as F

EXITS, B, S, V, D = 3, 2, 7, 64, 12


def inputs():
    return (
        torch.randn(EXITS, B, S, D, requires_grad=True),
        (torch.randn(V, D) / 3).requires_grad_(),
        torch.randint(V, (B, S)),
    )


def loss(hidden_states, head, labels):
    scales = torch.arange(1, EXITS + 1) / sum(range(1, EXITS + 1))
    total = 0
    for scale, hidden in zip(scales.unbind(), hidden_states):
        logits = F.linear(hidden, head)
        total = total + scale * F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return total


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
