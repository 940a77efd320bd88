"""Switch Transformer: the square of the router's normaliser, and the loads of the experts by their gates.

Source: huggingface/transformers, models/switch_transformers/modeling_switch_transformers.py
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

B, S, D, EXPERTS, V = 2, 8, 12, 8, 48
OPTIONS = {"min_vocab": 32}


def inputs():
    labels = torch.randint(V, (B, S))
    labels[1, 5:] = -100
    shapes = (B, S, D), (D, EXPERTS), (D, V)
    return *(torch.randn(*shape, requires_grad=True) for shape in shapes), labels


def router_z_loss(router_logits):
    num_groups, tokens_per_group, _ = router_logits.shape
    log_z = torch.logsumexp(router_logits, dim=-1)
    z_loss = log_z**2
    return torch.sum(z_loss) / (num_groups * tokens_per_group)


def load_balancing_loss(router_probs, expert_indices):
    num_experts = router_probs.shape[-1]
    expert_mask = F.one_hot(expert_indices, num_experts).float()
    tokens_per_group_and_expert = expert_mask.mean(dim=-2)
    router_prob_per_group_and_expert = router_probs.mean(dim=-2)
    return (tokens_per_group_and_expert * router_prob_per_group_and_expert).mean() * num_experts**2


def loss(hidden, router, head, labels):
    router_logits = hidden @ router
    router_probs = F.softmax(router_logits, dim=-1)
    expert_gate, expert_index = router_probs.max(dim=-1)
    logits = (hidden * expert_gate.unsqueeze(-1)) @ head
    aux = router_z_loss(router_logits) + load_balancing_loss(router_probs, expert_index)
    return F.cross_entropy(logits.view(-1, V), labels.view(-1)) + 0.01 * aux


EXPECTED = """\
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
SMALL_VOCAB: The vocabulary of 8 is below min_vocab=32. Lower the option min_vocab if you want it
    fused all the same.
"""
