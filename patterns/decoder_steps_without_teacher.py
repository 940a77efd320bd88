"""Decoder without its teacher: the likeliest word goes into the next step, all log-probabilities to the loss.

Source: none named; the other half of the loop that tutorials of translation have
Family: Several losses
"""

import torch
import torch.nn.functional as F

N, S, D, V = 5, 3, 8, 60


def inputs():
    tensors = torch.randn(N, D), torch.randn(V, D), torch.randn(D, D)
    return *(t.requires_grad_() for t in tensors), torch.randint(V, (N, S))


def loss(hidden, embedding, weight, target):
    words, outputs = target[:, 0], []
    for _ in range(S):
        hidden = torch.tanh(hidden @ weight + embedding[words])
        output = F.log_softmax(hidden @ embedding.t(), dim=1)
        words = output.topk(1).indices.squeeze(-1).detach()
        outputs.append(output.unsqueeze(1))
    return F.nll_loss(torch.cat(outputs, dim=1).view(-1, V), target.view(-1))


EXPECTED = """\
pick(y) - lse
kept: log_softmax of all classes [5x60], read by topk (words =
    output.topk(1).indices.squeeze(-1).detach())
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
pick(y) - lse
kept: log_softmax of all classes [5x60], read by topk (words =
    output.topk(1).indices.squeeze(-1).detach())
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
pick(y) - lse
kept: log_softmax of all classes [5x60], read by topk (words =
    output.topk(1).indices.squeeze(-1).detach())
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
