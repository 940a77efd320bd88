"""Scoring with the likeliest tokens: the best log-probabilities of each place beside that of the token there.

Source: vllm-project/vllm, vllm/v1/sample/sampler.py
Family: Kept beside
"""

import torch

B, S, V, TOP = 2, 8, 48, 5


def inputs():
    return torch.randn(B, S, V, requires_grad=True), torch.randint(V, (B, S))


def loss(logits, token_ids):
    logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
    topk_logprobs, topk_indices = torch.topk(logprobs, TOP, dim=-1)
    token_logprobs = logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return -token_logprobs.mean(), topk_logprobs, topk_indices


EXPECTED = """\
pick(y) - lse
kept: log_softmax of all classes [2x8x48], read by topk (topk_logprobs, topk_indices =
    torch.topk(logprobs, TOP, dim=-1))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
