"""R-Drop for language models: two passes through one head, whose weight has a gradient of both.

Source: dropreg/R-Drop, huggingface_transformer_src
Family: Several sides
"""

import torch
import torch.nn.functional as F

B, S, V, D = 2, 6, 64, 8


def inputs():
    labels = torch.randint(V, (B, S))
    labels[:, :2] = -100
    passes = [torch.randn(B, S, D, requires_grad=True) for _ in range(2)]
    return *passes, torch.randn(V, D, requires_grad=True), labels


def loss(hidden, hidden_again, lm_head, labels, alpha=1.0):
    labels = labels.view(-1)
    logits = [(h @ lm_head.t()).view(-1, lm_head.shape[0]) for h in (hidden, hidden_again)]
    loss = sum(F.cross_entropy(each, labels) for each in logits) / 2
    p, q = (F.log_softmax(each, dim=-1) for each in logits)
    p_loss = F.kl_div(p, F.softmax(logits[1], dim=-1), reduction="none").sum(-1)
    q_loss = F.kl_div(q, F.softmax(logits[0], dim=-1), reduction="none").sum(-1)
    mask = labels != -100
    return loss + alpha * ((p_loss + q_loss) / 2 * mask).sum() / mask.sum()


EXPECTED = """\
mean[y != -100](lse - pick(y))
sum 0.5*p*(log p - log q) + 0.5*q*(log q - log p)
row_stats: max,sumexp,pick
sharded: left as written
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
