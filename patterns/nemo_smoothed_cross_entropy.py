"""NeMo: log-probabilities given, smoothing eps V/(V - 1), a mask, a small number below the line.

Source: NVIDIA/NeMo, nemo/collections/common/losses/smoothed_cross_entropy.py
Family: Label smoothing
"""

import torch

B, S, V, PAD = 2, 8, 64, 0


def inputs():
    labels = torch.randint(1, V, (B, S))
    labels[1, 6:] = PAD
    return (3 * torch.randn(B, S, V)).requires_grad_(), labels


def loss(logits, labels, label_smoothing=0.1, eps=1e-6):
    log_probs = torch.log_softmax(logits, dim=-1)
    output_mask = (labels != PAD).to(log_probs.dtype)
    smoothing = V * label_smoothing / (V - 1)
    target_log_probs = log_probs.gather(2, labels.unsqueeze(2)).squeeze(2)
    smoothing_log_probs = log_probs.mean(dim=-1)
    mixed = (1.0 - smoothing) * target_log_probs + smoothing * smoothing_log_probs
    return -torch.sum(mixed * output_mask) / (output_mask.sum() + eps)


EXPECTED = """\
0.8984126984126984*pick(y) + 0.10158730158730159*sum/V - lse
row_stats: max,sumexp,pick,sum
sharded: all_gather [4, N]
"""
