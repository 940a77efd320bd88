"""Stable Baselines3: a categorical normalised before it is masked, and again after that, which is fused.

Source: Stable-Baselines-Team/stable-baselines3-contrib, sb3_contrib/common/maskable/distributions.py
Family: Look-alikes
"""

import torch
from torch.distributions import Categorical
from torch.distributions.utils import logits_to_probs

N, V = 16, 48


class MaskableCategorical(Categorical):
    def __init__(self, logits, masks):
        super().__init__(logits=logits, validate_args=False)
        self.masks = masks.reshape(self.logits.shape)
        huge_neg = torch.tensor(-1e8, dtype=self.logits.dtype, device=self.logits.device)
        super().__init__(logits=torch.where(self.masks, self.logits, huge_neg), validate_args=False)
        self.probs = logits_to_probs(self.logits)

    def entropy(self):
        p_log_p = self.logits * self.probs
        p_log_p = torch.where(self.masks, p_log_p, torch.tensor(0.0, device=self.logits.device))
        return -p_log_p.sum(-1)


def inputs():
    masks = torch.rand(N, V) > 0.4
    masks[:, :4] = True
    old = -2 - torch.rand(N)
    return torch.randn(N, V, requires_grad=True), masks, torch.randint(4, (N,)), old, torch.randn(N)


def loss(logits, masks, actions, old_log_prob, advantages, clip_range=0.2, ent_coef=0.01):
    policy = MaskableCategorical(logits, masks)
    ratio = torch.exp(policy.log_prob(actions) - old_log_prob)
    clipped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    policy_loss = -torch.min(advantages * ratio, advantages * clipped).mean()
    return policy_loss - ent_coef * torch.mean(policy.entropy())


EXPECTED = """\
pick(y) - lse
lse*mean_p(k) - mean_pz(k)
row_stats: max,sumexp,pick,mass:0,expdot:0,expzdot:0
sharded: all_gather [6, N]
NOT_UNDERSTOOD: The result of logsumexp goes into where
    (super().__init__(logits=torch.where(self.masks, self.logits, huge_neg), validate_args=False)). If
    this is a cross entropy, write this step in one of the spellings that the README lists; if not, it
    runs as written.
"""
