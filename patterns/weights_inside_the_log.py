"""Classes weighed inside the logarithm: log sum_i w_i exp(z_i), beside the label's logit of the same row.

Source: none named; softmax with priors of the classes, as for long-tailed data
Family: Normalisers
"""

import torch

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,)), torch.rand(V) + 0.1


def loss(logits, labels, prior):
    normaliser = torch.log((prior * logits.exp()).sum(dim=-1))
    return (normaliser - logits.gather(1, labels[:, None]).squeeze(1)).mean()


EXPECTED = """\
log(mean_p(w)) + lse - pick(y)
row_stats: max,sumexp,pick,expdot:0
sharded: all_gather [4, N]
"""
