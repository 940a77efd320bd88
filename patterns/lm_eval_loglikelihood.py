"""lm-evaluation-harness: the log-likelihood of a continuation, and whether it is the greedy one.

Source: EleutherAI/lm-evaluation-harness, lm_eval/models/huggingface.py
Family: Log-probabilities
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    logits = (3 * torch.randn(B, S, V)).bfloat16().requires_grad_()
    tokens = torch.randint(V, (B, S))
    tokens[0] = logits[0].argmax(-1)
    return logits, tokens


def loss(logits, continuation):
    log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    greedy = log_probs.argmax(dim=-1)
    matches = (greedy == continuation).all(-1)
    picked = torch.gather(log_probs, 2, continuation.unsqueeze(-1)).squeeze(-1)
    return picked.sum(-1), matches


EXPECTED = """\
argmax
pick(y) - lse
row_stats: max,sumexp,pick,argmax
sharded: all_gather [4, N]
"""
