"""A judge's reward: the probability of "yes" over that of "yes" and "no", from the last token's logits.

Source: linzhiqiu/t2v_metrics, t2v_metrics/models/vqascore_models/clip_t5_model.py
Family: Log-probabilities
"""

import torch

B, S, V = 6, 4, 64
YES, NO = 7, 21


def inputs():
    return torch.randn(B, S, V, requires_grad=True), torch.randint(V, (B,))


def loss(logits, answers):
    log_probs = torch.log_softmax(logits[:, -1, :], dim=-1)
    yes, no = log_probs[:, YES], log_probs[:, NO]
    reward = yes.exp() / (yes.exp() + no.exp())
    return reward, log_probs.gather(1, answers[:, None]).squeeze(1)


EXPECTED = """\
pick(7) - lse
pick(21) - lse
pick(y) - lse
row_stats: max,sumexp,pick,pick,pick
sharded: all_gather [5, N]
"""
