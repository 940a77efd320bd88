"""fairseq: nll of log-probabilities in float32, summed, padding left out.

Source: facebookresearch/fairseq, fairseq/criterions/cross_entropy.py
Family: Log-probabilities
"""

import torch
import torch.nn.functional as F

B, S, V, PAD = 2, 8, 64, 1


def inputs():
    logits = (3 * torch.randn(B, S, V)).half().requires_grad_()
    target = torch.randint(2, V, (B, S))
    target[0, 5:] = PAD
    return logits, target


def loss(logits, target):
    lprobs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    lprobs = lprobs.view(-1, lprobs.size(-1))
    return F.nll_loss(lprobs, target.view(-1), ignore_index=PAD, reduction="sum")


EXPECTED = """\
sum[y != 1](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
