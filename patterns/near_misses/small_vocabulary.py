"""makemore: letters for tokens, so few that plain Inductor is as good.

Source: karpathy/makemore, makemore.py
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

B, T, V = 4, 8, 27
OPTIONS = {"min_vocab": 1024}  # the default


def inputs():
    targets = torch.randint(V, (B, T))
    targets[:, -2:] = -1
    return torch.randn(B, T, V, requires_grad=True), targets


def loss(logits, targets):
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


EXPECTED = """\
SMALL_VOCAB: The vocabulary of 27 is below min_vocab=1024. Lower the option min_vocab if you want it
    fused all the same.
"""
