"""Axolotl: distillation from the teacher's top k log-probabilities, the student's gathered at their ids.

Source: axolotl-ai-cloud/axolotl, src/axolotl/integrations/kd/topk_logprob/forward_kl.py
Family: KL divergence
"""

import torch

B, S, V, K = 2, 6, 64, 4


def inputs():
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(B * S)]).view(B, S, K)
    logprobs = torch.randn(B, S, K).log_softmax(-1)
    mask = (torch.arange(S)[None, :, None] >= 2).expand(B, S, K).float()
    return torch.randn(B, S, V, requires_grad=True), ids, logprobs, mask


def loss(student_logits, target_ids, target_logprobs, target_mask):
    topk = torch.gather(student_logits, dim=-1, index=target_ids)
    lse = torch.logsumexp(student_logits, dim=-1, keepdim=True)
    student_logprobs = topk - lse
    per_token = target_logprobs.exp() * (target_logprobs - student_logprobs)
    return (per_token * target_mask).sum() / target_mask[..., 0].sum()


EXPECTED = """\
pick(y) - lse, pick(y2) - lse, pick(y3) - lse, pick(y4) - lse
row_stats: max,sumexp,pick,pick,pick,pick
sharded: all_gather [6, N]
"""
