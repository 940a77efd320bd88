"""NeMo-RL: upcast log-probabilities of the next tokens, importance weights detached from the graph.

Source: NVIDIA-NeMo/RL, nemo_rl/algorithms/loss_functions.py
Family: Policy gradients
"""

import torch

B, S, V = 2, 9, 64


def inputs():
    mask = (torch.arange(S)[None] >= torch.tensor([[3], [2]])).float()
    logits = torch.randn(B, S, V).bfloat16().requires_grad_()
    generation = -4 - torch.rand(B, S - 1)
    return logits, torch.randint(V, (B, S)), mask, generation, torch.randn(B, S)


def loss(next_token_logits, ids, mask, generation_logprobs, advantages):
    log_probs = torch.nn.functional.log_softmax(next_token_logits.to(torch.float32)[:, :-1], dim=-1)
    current = log_probs.gather(dim=-1, index=ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    importance = torch.exp(current - generation_logprobs).detach()
    importance = torch.nan_to_num(importance, nan=0.0, posinf=0.0, neginf=0.0)
    actor = -(importance * advantages[:, 1:] * current)
    token_mask = mask[:, 1:]
    return (actor * token_mask).sum() / (token_mask.sum() + 1e-8)


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
