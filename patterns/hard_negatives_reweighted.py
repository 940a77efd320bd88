"""HCL: negatives weighed by a power of themselves, over the mean of these powers.

Source: joshr17/HCL, image/main.py, with a queue of negatives
Family: Contrastive
"""

import torch
import torch.nn.functional as F

B, D, N = 16, 12, 48


def inputs():
    return torch.randn(B, D, requires_grad=True), torch.randn(B, D), torch.randn(N, D)


def loss(out_1, out_2, queue, temperature=0.5, beta=1.0):
    out_1, out_2, queue = (F.normalize(x, dim=-1) for x in (out_1, out_2, queue))
    neg = torch.exp(torch.mm(out_1, queue.t().contiguous()) / temperature)
    pos = torch.exp(torch.sum(out_1 * out_2, dim=-1) / temperature)
    imp = (beta * neg.log()).exp()
    reweight_neg = (imp * neg).sum(dim=-1) / imp.mean(dim=-1)
    return (-torch.log(pos / (pos + reweight_neg))).mean()


EXPECTED = """\
exp(lse(2))
exp(lse)/V
row_stats: max,sumexp,sumexp^2
sharded: all_gather [3, N]
"""
