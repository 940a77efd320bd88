"""fairseq: nll and the sum of all log-probabilities, padding filled in place, eps/(V - 1).

Source: facebookresearch/fairseq, fairseq/criterions/label_smoothed_cross_entropy.py
Family: Label smoothing
"""

import torch

N, V, PAD = 16, 64, 1


def inputs():
    target = torch.randint(2, V, (N,))
    target[-4:] = PAD
    return (3 * torch.randn(N, V)).half().requires_grad_(), target


def loss(logits, target, epsilon=0.1):
    lprobs = torch.log_softmax(logits, -1, dtype=torch.float32)
    target = target.unsqueeze(-1)
    nll = -lprobs.gather(dim=-1, index=target)
    smooth = -lprobs.sum(dim=-1, keepdim=True)
    pad = target.eq(PAD)
    nll.masked_fill_(pad, 0.0)
    smooth.masked_fill_(pad, 0.0)
    nll, smooth = nll.sum(), smooth.sum()
    eps_i = epsilon / (lprobs.size(-1) - 1)
    return (1.0 - epsilon - eps_i) * nll + eps_i * smooth, nll.detach()


EXPECTED = """\
lse - pick(y)
V*lse - sum
row_stats: max,sumexp,pick,sum
sharded: all_gather [4, N]
"""
