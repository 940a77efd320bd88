"""transformers, Trainer: nll and the sum of log-probabilities, each over the tokens that count.

Source: huggingface/transformers, src/transformers/trainer_pt_utils.py
Family: Label smoothing
"""

import torch

B, S, V = 2, 8, 64


def inputs():
    labels = torch.randint(V, (B, S))
    labels[0, 5:] = -100
    return (3 * torch.randn(B, S, V)).requires_grad_(), labels


def loss(logits, labels, epsilon=0.1, ignore_index=-100):
    log_probs = -torch.nn.functional.log_softmax(logits, dim=-1)
    labels = labels.unsqueeze(-1)
    padding = labels.eq(ignore_index)
    labels = torch.clamp(labels, min=0)
    nll = log_probs.gather(dim=-1, index=labels)
    smoothed = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll.masked_fill_(padding, 0.0)
    smoothed.masked_fill_(padding, 0.0)
    active = padding.numel() - padding.long().sum()
    return (1 - epsilon) * nll.sum() / active + epsilon * smoothed.sum() / (active * log_probs.shape[-1])


EXPECTED = """\
lse - pick(y)
V*lse - sum
row_stats: max,sumexp,pick,sum
sharded: all_gather [4, N]
"""
