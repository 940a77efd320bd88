"""R-Drop in fairseq: one pass over a doubled batch, whose halves are divided after the softmax.

Source: dropreg/R-Drop, fairseq_src/fairseq/criterions/label_smoothed_cross_entropy_with_reg.py
Family: Several sides
"""

import torch
import torch.nn.functional as F

B, S, V, PAD = 4, 6, 48, 1


def inputs():
    target = torch.randint(2, V, (B, S))
    target[:, 4:] = PAD
    return (2 * torch.randn(2 * B, S, V)).requires_grad_(), target


def loss(net_output, target, alpha=5.0):
    doubled = torch.cat([target, target])
    lprobs = F.log_softmax(net_output, dim=-1)
    probs = F.softmax(net_output, dim=-1)
    nll = F.nll_loss(lprobs.view(-1, V), doubled.view(-1), ignore_index=PAD, reduction="sum")
    p, q = torch.split(lprobs, B, dim=0)
    p_tec, q_tec = torch.split(probs, B, dim=0)
    pad_mask = target.unsqueeze(-1).eq(PAD)
    p_loss = F.kl_div(p, q_tec, reduction="none").masked_fill(pad_mask, 0.0).sum()
    q_loss = F.kl_div(q, p_tec, reduction="none").masked_fill(pad_mask, 0.0).sum()
    return nll + alpha * (p_loss + q_loss) / 2


EXPECTED = """\
sum[y != 1](lse - pick(y))
sum(sum 2.5*p*(log p - log q) + 2.5*q*(log q - log p))
row_stats: max,sumexp,pick
sharded: left as written
"""
