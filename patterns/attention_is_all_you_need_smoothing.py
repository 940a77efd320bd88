"""attention-is-all-you-need-pytorch: one-hot by scatter, eps/(V - 1) on the others, padding taken out.

Source: jadore801120/attention-is-all-you-need-pytorch, train.py
Family: Label smoothing
"""

import torch
import torch.nn.functional as F

N, V, PAD = 16, 64, 1


def inputs():
    gold = torch.randint(2, V, (N,))
    gold[::6] = PAD
    return (3 * torch.randn(N, V)).requires_grad_(), gold


def loss(pred, gold, eps=0.1):
    n_class = pred.size(1)
    one_hot = torch.zeros_like(pred).scatter(1, gold.view(-1, 1), 1)
    one_hot = one_hot * (1 - eps) + (1 - one_hot) * eps / (n_class - 1)
    log_prb = F.log_softmax(pred, dim=1)
    per_token = -(one_hot * log_prb).sum(dim=1)
    return torch.where(gold.ne(PAD), per_token, 0.0).sum()


EXPECTED = """\
0.0015873015873015873*V*lse + 0.8984126984126984*lse - 0.8984126984126984*pick(y) -
    0.0015873015873015873*sum
row_stats: max,sumexp,pick,sum
sharded: all_gather [4, N]
"""
