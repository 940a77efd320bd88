"""Masked categorical: logits times probabilities by einsum, what is not allowed set to 0, then summed.

Source: AdilZouitine/boring-guy, masking-rl
Family: Policy gradients
"""

import torch
from torch.distributions import Categorical

N, V = 16, 48


class CategoricalMasked(Categorical):
    def __init__(self, logits, mask):
        self.mask = mask
        lowest = torch.tensor(torch.finfo(logits.dtype).min, dtype=logits.dtype)
        super().__init__(logits=torch.where(mask, logits, lowest), validate_args=False)

    def entropy(self):
        p_log_p = torch.einsum("ij,ij->ij", self.logits, self.probs)
        zero = torch.tensor(0, dtype=p_log_p.dtype, device=p_log_p.device)
        return -torch.where(self.mask, p_log_p, zero).sum(-1)


def inputs():
    mask = torch.rand(N, V) > 0.4
    mask[:, :4] = True
    return torch.randn(N, V, requires_grad=True), mask, torch.randint(4, (N,)), torch.randn(N)


def loss(logits, mask, actions, advantages):
    policy = CategoricalMasked(logits, mask)
    return -(policy.log_prob(actions) * advantages).mean() - 0.01 * policy.entropy().mean()


EXPECTED = """\
pick(y) - lse
lse*mean_p(k) - mean_pz(k)
row_stats: max,sumexp,pick,mass:0,expdot:0,expzdot:0
sharded: all_gather [6, N]
"""
