"""GRU4Rec: BPR-max with a softmax by hand, of scores times a mask, whose weights are of the scores without.

Source: hidasib/GRU4Rec_PyTorch_Official, gru4rec_pytorch.py
Family: Look-alikes
"""

import torch

N, ITEMS = 16, 48


def inputs():
    return (torch.randn(N, ITEMS, requires_grad=True),)


def softmax_of_negatives(scores):
    others = 1.0 - torch.eye(*scores.shape)
    scores = scores * others
    exps = torch.exp(scores - scores.max(dim=1, keepdim=True)[0]) * others
    return exps / exps.sum(dim=1, keepdim=True)


def loss(scores, bpreg=0.5):
    weights = softmax_of_negatives(scores)
    target = torch.diag(scores).unsqueeze(1)
    wins = torch.sum(torch.sigmoid(target - scores) * weights, dim=1)
    return torch.sum(-torch.log(wins + 1e-24) + bpreg * torch.sum((scores**2) * weights, dim=1))


EXPECTED = """\
SOFT_TARGETS: The classes are weighed by sigmoid (wins = torch.sum(torch.sigmoid(target - scores) *
    weights, dim=1)) [16, 48], of which a gradient is wanted. Detach the targets if they are meant as
    constants; no gradient reaches them through the kernels.
"""
