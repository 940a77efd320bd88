"""The Brier score: powers of the probabilities beside a target, which cancel where the prediction is good.

Source: google/uncertainty-baselines, and scikit-learn's brier_score_loss in torch
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return (2 * torch.randn(N, V)).requires_grad_(), torch.randint(V, (N,))


def loss(logits, labels):
    probs = F.softmax(logits, dim=-1)
    picked = probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (1 - 2 * picked + probs.square().sum(dim=-1)).mean()


EXPECTED = """\
NOT_UNDERSTOOD: Powers of the probabilities are summed beside the probabilities of a target, and
    gradients are wanted: where the prediction is near the target they cancel, which sums of a row do
    not survive. If this is a cross entropy, write this step in one of the spellings that the README
    lists; if not, it runs as written.
"""
