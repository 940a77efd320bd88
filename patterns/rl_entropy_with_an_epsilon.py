"""Actor-critics: an entropy bonus, with an epsilon against log(0), beside its log-probabilities.

Source: in the manner of Khrylx/PyTorch-RL and many actor-critics; none named
Family: Each entry
"""

import torch

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,)), torch.randn(N)


def loss(logits, actions, advantages):
    probs = torch.softmax(logits, dim=-1)
    log_probs = torch.log(probs.gather(1, actions.unsqueeze(1)) + 1e-8).squeeze(1)
    entropy = -(probs * torch.log(probs + 1e-8)).sum(dim=-1)
    return -(log_probs * advantages).mean() - 0.01 * entropy.mean()


EXPECTED = """\
log(1e-08 + exp(pick(y) - lse))
sum p*log(p + 1e-08)
row_stats: max,sumexp,pick
sharded: left as written
"""
