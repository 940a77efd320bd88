"""Megatron-LM: smoothing by alpha V/(V - 1) of the mean log-probability.

Source: NVIDIA/Megatron-LM, megatron/core/tensor_parallel/cross_entropy.py
Family: Label smoothing
"""

import torch

S, B, V = 8, 2, 64


def inputs():
    return (3 * torch.randn(S, B, V)).requires_grad_(), torch.randint(V, (S, B))


def loss(logits, target, label_smoothing=0.1):
    shifted = logits - logits.amax(-1, keepdim=True)
    exp_logits = shifted.exp()
    sum_exp = exp_logits.sum(-1)
    picked = torch.gather(shifted, -1, target.unsqueeze(-1)).squeeze(-1)
    nll = sum_exp.log() - picked
    probabilities = exp_logits / sum_exp.unsqueeze(-1)
    smoothing = label_smoothing * V / (V - 1)
    mean_log_probs = torch.log(probabilities).mean(dim=-1)
    return (1.0 - smoothing) * nll - smoothing * mean_log_probs


EXPECTED = """\
lse - 0.8984126984126984*pick(y) - 0.10158730158730159*sum/V
row_stats: max,sumexp,pick,sum
sharded: all_gather [4, N]
"""
