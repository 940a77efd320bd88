"""Information in bits: the binary logarithm of probabilities against one-hot labels, and their entropy.

Source: none named; losses that are told in bits
Family: By hand
"""

import torch
import torch.nn.functional as F

N, V = 12, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))


def loss(logits, labels, beta=0.1):
    probs = F.softmax(logits, dim=-1)
    onehot = F.one_hot(labels, V).to(probs.dtype)
    bits = -torch.einsum("nv,nv->n", onehot, torch.log2(probs))
    entropy = -(probs * probs.log2()).sum(dim=-1)
    return (bits - beta * entropy).mean() + torch.log10(probs.gather(1, labels[:, None])).mean()


EXPECTED = """\
0.1*mean_p/log(2) + 0.9*lse/log(2) - pick(y)/log(2)
(pick(y) - lse)/log(10)
row_stats: max,sumexp,pick,sumexpz
sharded: all_gather [4, N]
"""
