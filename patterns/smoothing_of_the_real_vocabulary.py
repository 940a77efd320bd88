"""A padded vocabulary: labels smoothed over the words that there are, by a slice of log-probabilities.

Source: none named; label smoothing by hand over a head whose columns were rounded up
Family: Label smoothing
"""

import torch
import torch.nn.functional as F

N, D, V, PADDED = 12, 8, 61, 64


def inputs():
    target = torch.randint(V, (N,))
    return torch.randn(N, D, requires_grad=True), torch.randn(PADDED, D, requires_grad=True), target


def loss(x, weight, target, smoothing=0.1):
    logprobs = F.log_softmax(F.linear(x, weight), dim=-1)
    nll_loss = -logprobs.gather(dim=-1, index=target.unsqueeze(1)).squeeze(1)
    smooth_loss = -logprobs[:, :V].mean(dim=-1)
    return ((1 - smoothing) * nll_loss + smoothing * smooth_loss).mean()


EXPECTED = """\
0.001639344262295082*lse*mass(k) + 0.9*lse - 0.001639344262295082*dot(k) - 0.9*pick(y)
row_stats: max,sumexp,pick,seendot:0
sharded: all_gather [4, N]
"""
