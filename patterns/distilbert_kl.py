"""transformers, distillation: KL between softened distributions times T squared, beside the hard loss.

Source: huggingface/transformers, examples/research_projects/distillation/distiller.py
Family: KL divergence
"""

import torch
import torch.nn.functional as F
from torch import nn

N, V = 16, 64
ce_loss_fct = nn.KLDivLoss(reduction="batchmean")


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randn(N, V), torch.randint(V, (N,))


def loss(s_logits, t_logits, labels, temperature=2.0):
    log_probs = F.log_softmax(s_logits / temperature, dim=-1)
    soft = ce_loss_fct(log_probs, F.softmax(t_logits / temperature, dim=-1)) * temperature**2
    return 5.0 * soft + 2.0 * F.cross_entropy(s_logits, labels)


EXPECTED = """\
batchmean(sum q*(log q - log p), targets constant)
row_stats: max,sumexp
sharded: as a loss of one side
mean[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
