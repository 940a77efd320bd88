"""SwAV: cross entropy of one view's scores to the codes of the other.

Source: facebookresearch/swav, main_swav.py
Family: Soft targets
"""

import torch
import torch.nn.functional as F

B, V = 12, 64


def inputs():
    return torch.randn(2 * B, V, requires_grad=True), torch.rand(B, V).softmax(1), torch.rand(B, V).softmax(1)


def loss(output, q_first, q_second, temperature=0.1):
    swapped = ((q_first, output[B:]), (q_second, output[:B]))
    terms = [-torch.mean(torch.sum(q * F.log_softmax(x / temperature, dim=1), dim=1)) for q, x in swapped]
    return (terms[0] + terms[1]) / 2


EXPECTED = """\
dot(q) - lse*mass(q)
row_stats: max,sumexp,dot:0,mass:0
sharded: all_gather [4, N]
dot(q) - lse*mass(q)
row_stats: max,sumexp,dot:0,mass:0
sharded: all_gather [4, N]
"""
