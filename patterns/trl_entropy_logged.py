"""TRL: the mean entropy and the token accuracy logged under no_grad beside the loss.

Source: huggingface/trl, trl/trainer/sft_trainer.py
Family: Entropy and accuracy
"""

import torch
import torch.nn.functional as F

B, S, V = 2, 9, 64


def inputs():
    labels = torch.randint(V, (B, S))
    labels[:, :3] = -100
    return torch.randn(B, S, V, requires_grad=True), labels


def loss(logits, labels):
    shift_logits, shift_labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
    value = F.cross_entropy(shift_logits.view(-1, V), shift_labels.view(-1))
    with torch.no_grad():
        logps = F.log_softmax(shift_logits, dim=-1)
        entropy = -(torch.exp(logps) * logps).sum(dim=-1)
        counts = shift_labels != -100
        mean_entropy = (entropy * counts).sum() / counts.sum()
        correct = (shift_logits.argmax(dim=-1) == shift_labels) & counts
        accuracy = correct.sum() / counts.sum()
    return value, mean_entropy, accuracy


EXPECTED = """\
mean[y != -100](lse - pick(y))
lse - mean_p
argmax
row_stats: max,sumexp,pick,sumexpz,argmax
sharded: all_gather [5, N]
"""
