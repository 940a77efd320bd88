"""LLM Foundry: labels rolled by one, the last of each row ignored by assignment.

Source: mosaicml/llm-foundry, llmfoundry/models/mpt/modeling_mpt.py
Family: Causal shift
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 8, 64


def inputs():
    labels = torch.randint(V, (B, S))
    labels[1, 2:4] = -100
    return (3 * torch.randn(B, S, V)).requires_grad_(), labels


def loss(logits, labels):
    targets = torch.roll(labels, shifts=-1)
    targets[:, -1] = -100
    losses = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), reduction="none")
    return losses.sum() / (targets != -100).sum()


EXPECTED = """\
[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
