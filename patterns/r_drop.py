"""R-Drop: two passes with other dropout, their divergence both ways, a gradient to both.

Source: dropreg/R-Drop, fairseq_src/examples/roberta/roberta_rdrop_src/loss/reg_cross_entropy.py
Family: Several sides
"""

import torch
import torch.nn.functional as F

B, V = 8, 48


def inputs():
    return (
        torch.randn(B, V, requires_grad=True),
        torch.randn(B, V, requires_grad=True),
        torch.randint(V, (B,)),
    )


def loss(logits1, logits2, labels, alpha=4.0):
    p, p_tec = F.log_softmax(logits1, dim=-1), F.softmax(logits1, dim=-1)
    q, q_tec = F.log_softmax(logits2, dim=-1), F.softmax(logits2, dim=-1)
    p_loss = F.kl_div(p, q_tec, reduction="none").sum()
    q_loss = F.kl_div(q, p_tec, reduction="none").sum()
    ce = 0.5 * (F.cross_entropy(logits1, labels) + F.cross_entropy(logits2, labels))
    return ce + alpha * (p_loss + q_loss) / 2


EXPECTED = """\
mean[y != -100](lse - pick(y))
sum(sum 2*p*(log p - log q) + 2*q*(log q - log p))
row_stats: max,sumexp,pick
sharded: left as written
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
