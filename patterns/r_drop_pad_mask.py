"""R-Drop as its README has it: two passes, whose divergence is masked in place, and their cross entropies.

Source: dropreg/R-Drop, README.md
Family: Several sides
"""

import torch
import torch.nn.functional as F

B, S, V, D, PAD = 2, 6, 64, 8, 1


def inputs():
    label = torch.randint(2, V, (B, S))
    label[:, 4:] = PAD
    passes = [torch.randn(B, S, D, requires_grad=True) for _ in range(2)]
    return *passes, torch.randn(V, D, requires_grad=True), label


def compute_kl_loss(p, q, pad_mask=None):
    p_loss = F.kl_div(F.log_softmax(p, dim=-1), F.softmax(q, dim=-1), reduction="none")
    q_loss = F.kl_div(F.log_softmax(q, dim=-1), F.softmax(p, dim=-1), reduction="none")
    if pad_mask is not None:
        p_loss.masked_fill_(pad_mask, 0.0)
        q_loss.masked_fill_(pad_mask, 0.0)
    p_loss = p_loss.sum()
    q_loss = q_loss.sum()
    return (p_loss + q_loss) / 2


def loss(hidden1, hidden2, weight, label, alpha=4.0):
    logits1, logits2 = F.linear(hidden1, weight), F.linear(hidden2, weight)
    ce_loss = 0.5 * (
        F.cross_entropy(logits1.view(-1, V), label.view(-1), ignore_index=PAD)
        + F.cross_entropy(logits2.view(-1, V), label.view(-1), ignore_index=PAD)
    )
    kl_loss = compute_kl_loss(logits1, logits2, label.unsqueeze(-1).eq(PAD))
    return ce_loss + alpha * kl_loss


EXPECTED = """\
mean[y != 1](lse - pick(y))
sum(sum 2*p*(log p - log q) + 2*q*(log q - log p))
row_stats: max,sumexp,pick
sharded: left as written
mean[y != 1](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
