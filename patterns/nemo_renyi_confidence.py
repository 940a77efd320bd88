"""NeMo: a confidence from the Renyi entropy of order 1/3, 1 where one class has all.

Source: NVIDIA/NeMo, nemo/collections/asr/parts/utils/asr_confidence_utils.py
Family: Entropy and accuracy
"""

import math

import torch

N, V = 16, 48


def inputs():
    return ((2 * torch.randn(N, V)).requires_grad_(),)


def loss(logits, t=1 / 3):
    x = torch.log_softmax(logits, dim=-1)
    neg_entropy = torch.log((x * t).exp().sum(-1)) / (t - 1)
    return (1 + neg_entropy / math.log(V)).mean()


EXPECTED = """\
0.12915888340366435*lse + 1 - 0.38747665021099315*lse(0.3333333333333333)
row_stats: max,sumexp,sumexp^0.3333333333333333
sharded: all_gather [3, N]
"""
