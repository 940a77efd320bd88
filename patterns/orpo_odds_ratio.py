"""ORPO: the log of an odds ratio of mean log-probabilities, beside the cross entropy of what was chosen.

Source: xfactlab/orpo, src/orpo_trainer.py
Family: Preferences
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 7, 64


def inputs():
    chosen, rejected = torch.randn(B, S, V, requires_grad=True), torch.randn(B, S, V, requires_grad=True)
    mask = (torch.arange(S)[None] >= torch.tensor([[2], [3]])).float()
    return chosen, rejected, torch.randint(V, (B, S)), torch.randint(V, (B, S)), mask


def mean_logps(logits, ids, mask):
    logps = logits[:, :-1].log_softmax(-1)
    picked = torch.gather(logps, 2, (mask[:, 1:] * ids[:, 1:]).long().unsqueeze(2)).squeeze(2)
    return (picked * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)


def loss(chosen, rejected, chosen_ids, rejected_ids, mask, alpha=0.1):
    labels = chosen_ids.masked_fill(mask == 0, -100)
    nll = F.cross_entropy(chosen[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
    pos, neg = mean_logps(chosen, chosen_ids, mask), mean_logps(rejected, rejected_ids, mask)
    log_odds = (pos - neg) - (torch.log1p(-torch.exp(pos)) - torch.log1p(-torch.exp(neg)))
    return nll - alpha * torch.log(torch.sigmoid(log_odds)).mean()


EXPECTED = """\
mean[y != -100](lse - pick(y))
pick(y2) - lse
row_stats: max,sumexp,pick,pick
sharded: all_gather [4, N]
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
