"""Decoder of a recurrent network: log-probabilities of each step, side by side, flattened for the loss.

Source: none named; the loop that tutorials of translation have
Family: Several losses
"""

import torch
import torch.nn.functional as F

B, S, V, D = 4, 5, 48, 12


def inputs():
    sizes = (B, D), (S, B, D), (V, D), (D, D)
    return *(torch.randn(size, requires_grad=True) for size in sizes), torch.randint(V, (B, S))


def loss(state, given, weight, recurrent, labels):
    outputs = []
    for step in given:
        state = torch.tanh(F.linear(state, recurrent) + step)
        outputs.append(F.log_softmax(F.linear(state, weight), dim=-1).unsqueeze(1))
    log_p = torch.cat(outputs, dim=1)
    return F.nll_loss(log_p.view(-1, V), labels.view(-1), ignore_index=0)


EXPECTED = """\
mean[y != 0](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
