"""InfoNCE with several positives in front: a slice of the log-probabilities, summed.

Source: andrewhamara/SOLIS, infoNCE.py
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, P, D, K = 16, 3, 12, 45


def inputs():
    return torch.randn(N, D, requires_grad=True), torch.randn(N, P, D), torch.randn(K, D)


def loss(anchor, positives, negatives, temperature=0.5):
    sim_pos = torch.einsum("bd,bpd->bp", anchor, positives) / temperature
    sim_neg = torch.einsum("bd,nd->bn", anchor, negatives) / temperature
    log_softmax = F.log_softmax(torch.cat([sim_pos, sim_neg], dim=-1), dim=-1)
    return -log_softmax[:, :P].mean(dim=-1).mean()


EXPECTED = """\
NOT_UNDERSTOOD: The result of log_softmax goes into getitem (return -log_softmax[:,
    :P].mean(dim=-1).mean()). No dimension of its result holds the classes of one row. If this is a
    cross entropy, write this step in one of the spellings that the README lists; if not, it runs as
    written.
"""
