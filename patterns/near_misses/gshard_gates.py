"""DeepSpeed-MoE: the gates of the first and the second expert picked by one-hot masks, beside their loads.

Source: deepspeedai/DeepSpeed, deepspeed/moe/sharded_moe.py
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, D, EXPERTS, V = 16, 12, 8, 48
OPTIONS = {"min_vocab": 32}


def inputs():
    shapes = (N, D), (D, EXPERTS), (D, V)
    return *(torch.randn(*shape, requires_grad=True) for shape in shapes), torch.randint(V, (N,))


def gated(logits):
    gates = F.softmax(logits, dim=1)
    indices1 = torch.argmax(gates, dim=1)
    mask1 = F.one_hot(indices1, num_classes=EXPERTS)
    without_first = logits.masked_fill(mask1.bool(), float("-inf"))
    mask2 = F.one_hot(torch.argmax(without_first, dim=1), num_classes=EXPERTS)
    l_aux = torch.mean(gates.mean(dim=0) * mask1.float().mean(dim=0)) * EXPERTS * EXPERTS
    gates1 = torch.einsum("se,se->s", gates, mask1.float())
    gates2 = torch.einsum("se,se->s", gates, mask2.float())
    denominator = torch.clamp(gates1 + gates2, min=torch.finfo(torch.float32).eps)
    return gates1 / denominator, gates2 / denominator, l_aux


def loss(hidden, router, head, labels):
    first, second, l_aux = gated(hidden @ router)
    mixed = hidden * first[:, None] + hidden.roll(1, 0) * second[:, None]
    return F.cross_entropy(mixed @ head, labels) + 0.01 * l_aux


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
SMALL_VOCAB: The vocabulary of 8 is below min_vocab=32. Lower the option min_vocab if you want it
    fused all the same.
"""
