"""GEM: every class's log-probability against the label's, weighed by a sharper softmax without gradient.

Source: liziniu/GEM, utils/gem_triton_loss.py and sft_trainer.py, the loss named logsigmoid
Family: Each entry
"""

import torch
import torch.nn.functional as F

B, T, V = 2, 8, 48


def inputs():
    labels = torch.randint(V, (B, T))
    labels[:, :2] = -100
    return (2 * torch.randn(B, T, V)).requires_grad_(), labels


def loss(logits, labels, beta=0.7):
    shift_logits, shift_labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
    mask = shift_labels != -100
    targets = shift_labels.clamp(min=0)
    with torch.no_grad():
        on_labels = torch.gather(shift_logits, dim=-1, index=targets.unsqueeze(-1)).squeeze(-1)
        weights = torch.sigmoid(0.01 * (shift_logits - on_labels.unsqueeze(-1)))
    gene_log_probs = F.log_softmax(shift_logits, dim=-1)
    q_probs = torch.exp(F.log_softmax(shift_logits / beta, dim=-1)).detach()
    real_log_probs = torch.gather(gene_log_probs, dim=-1, index=targets.unsqueeze(-1))
    per_token = -torch.sum(q_probs * weights * (real_log_probs - gene_log_probs), dim=-1)
    return (per_token * mask).sum() / mask.sum()


EXPECTED = """\
pick(y) - lse
pick(y)
sum q*sigmoid(0.01*(z3 - c))*(n - log p)
row_stats: max,sumexp,pick
sharded: left as written
"""
