"""TRL: WPO weighs each pair by how likely its tokens are beside what the policy would write.

Source: huggingface/trl, trl/trainer/dpo_trainer.py (use_weighting)
Family: Preferences
"""

import torch
import torch.nn.functional as F

B, S, V = 4, 9, 48  # chosen sequences, then as many rejected ones


def inputs():
    labels = torch.randint(V, (B, S))
    mask = torch.rand(B, S) < 0.8
    mask[:, -1] = True
    return (2 * torch.randn(B, S, V)).requires_grad_(), labels, mask, torch.randn(B)


def loss(logits, labels, loss_mask, ref_logps, beta=0.1):
    logps = logits.log_softmax(-1)
    per_token_logps = torch.gather(logps, dim=2, index=labels.unsqueeze(2)).squeeze(2)
    per_token_logps = torch.where(loss_mask, per_token_logps, 0.0)
    with torch.no_grad():
        weights_adjustment_factor = torch.logsumexp(2 * logps, dim=-1)
        adjusted = per_token_logps - weights_adjustment_factor
        all_weights = (adjusted * loss_mask).sum(-1) / loss_mask.sum(-1)
        weights = torch.clamp(torch.exp(all_weights[: B // 2] + all_weights[B // 2 :]), max=1)
    ratios = per_token_logps.sum(-1) - ref_logps
    margin = ratios[: B // 2] - ratios[B // 2 :]
    return (-F.logsigmoid(beta * margin) * weights).mean()


EXPECTED = """\
pick(y) - lse
lse(2) - 2*lse
row_stats: max,sumexp,pick,sumexp^2
sharded: all_gather [4, N]
"""
