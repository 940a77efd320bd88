"""Invalid action masking: a masked categorical, whose entropy is that of the actions that are allowed.

Source: vwxyzjn/invalid-action-masking, invalid_action_masking/ppo_10x10.py
Family: Policy gradients
"""

import torch
from torch.distributions import Categorical

N, V = 16, 48


class CategoricalMasked(Categorical):
    def __init__(self, logits, masks):
        self.masks = masks.bool().to(logits.device)
        filled = torch.where(self.masks, logits, torch.tensor(-1e8).to(logits.device))
        super().__init__(logits=filled, validate_args=False)

    def entropy(self):
        p_log_p = self.logits * self.probs
        p_log_p = torch.where(self.masks, p_log_p, torch.tensor(0.0).to(self.logits.device))
        return -p_log_p.sum(-1)


def inputs():
    masks = torch.rand(N, V) > 0.4
    masks[:, :4] = True
    return torch.randn(N, V, requires_grad=True), masks.float(), torch.randint(4, (N,)), torch.randn(N)


def loss(logits, masks, actions, advantages):
    policy = CategoricalMasked(logits, masks)
    return -(policy.log_prob(actions) * advantages).mean() - 0.01 * policy.entropy().mean()


EXPECTED = """\
pick(y) - lse
lse*mean_p(k) - mean_pz(k)
row_stats: max,sumexp,pick,mass:0,expdot:0,expzdot:0
sharded: all_gather [6, N]
"""
