"""Mixtral: the loads of the two best experts of each token by the gates of all, beside a cross entropy.

Source: huggingface/transformers, models/mixtral/modeling_mixtral.py
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, D, EXPERTS, V = 16, 12, 8, 48
OPTIONS = {"min_vocab": 32}


def inputs():
    shapes = (N, D), (EXPERTS, D), (V, D)
    return *(torch.randn(*shape, requires_grad=True) for shape in shapes), torch.randint(V, (N,))


def load_balancing(gate_logits, top_k):
    routing_weights = F.softmax(gate_logits, dim=1, dtype=torch.float)
    _, selected_experts = torch.topk(routing_weights, top_k, dim=-1)
    expert_mask = F.one_hot(selected_experts, EXPERTS)
    tokens_per_expert = torch.mean(expert_mask.float(), dim=0)
    router_prob_per_expert = torch.mean(routing_weights, dim=0)
    return torch.sum(tokens_per_expert * router_prob_per_expert.unsqueeze(0)) * EXPERTS


def loss(hidden, gate, head, labels):
    gate_logits = F.linear(hidden, gate)
    routing_weights = F.softmax(gate_logits, dim=1, dtype=torch.float)
    routing_weights, _ = torch.topk(routing_weights, 2, dim=-1)
    routing_weights /= routing_weights.sum(dim=-1, keepdim=True)
    logits = F.linear(hidden * (1 + routing_weights[:, :1]), head)
    return F.cross_entropy(logits, labels) + 0.02 * load_balancing(gate_logits, 2)


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
