"""transformers, Cohere: logits times a number of the configuration.

Source: huggingface/transformers, src/transformers/models/cohere/modeling_cohere.py
Family: Soft-cap, scale, bias
"""

import torch
import torch.nn.functional as F

B, S, D, V = 2, 8, 4, 64


def inputs():
    h = torch.randn(B, S, D, dtype=torch.bfloat16).requires_grad_()
    return h, torch.randn(V, D, dtype=torch.bfloat16).requires_grad_(), torch.randint(V, (B, S))


def loss(hidden_states, weight, labels, logit_scale=0.0625):
    logits = F.linear(hidden_states, weight)
    logits = logits * logit_scale
    shift_logits = logits[..., :-1, :].contiguous().float()
    return F.cross_entropy(shift_logits.view(-1, V), labels[..., 1:].contiguous().view(-1))


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
