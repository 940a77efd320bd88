"""R-Drop of one doubled batch: its halves, each of whose divergences makes its own mask of the padding.

Source: none; dropreg/R-Drop, README.md, for a batch that is doubled as in its fairseq_src
Family: Several sides
"""

import torch
import torch.nn.functional as F

B, S, V, PAD = 2, 6, 48, 1


def inputs():
    target = torch.randint(2, V, (B, S))
    target[:, 4:] = PAD
    return (2 * torch.randn(2 * B, S, V)).requires_grad_(), target


def masked_kl(log_p, q, target):
    terms = F.kl_div(log_p, q, reduction="none")
    terms.masked_fill_((target == PAD).unsqueeze(-1), 0.0)
    return terms.sum()


def loss(logits, target, alpha=5.0):
    doubled = torch.cat([target, target])
    nll = F.cross_entropy(logits.view(-1, V), doubled.view(-1), ignore_index=PAD, reduction="sum")
    (log_p, log_q), (p, q) = (f(logits, dim=-1).chunk(2) for f in (F.log_softmax, F.softmax))
    return nll + alpha * (masked_kl(log_p, q, target) + masked_kl(log_q, p, target)) / 2


EXPECTED = """\
sum[y != 1](lse - pick(y))
sum(sum 2.5*p*(log p - log q) + 2.5*q*(log q - log p))
row_stats: max,sumexp,pick
sharded: left as written
"""
