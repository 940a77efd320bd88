"""A slip: R-Drop whose padding is masked under no_grad: the loss leaves it out, and its gradient does not.

Source: none; dropreg/R-Drop, README.md, with its mask under no_grad
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

B, S, V, PAD = 2, 6, 48, 1


def inputs():
    label = torch.randint(2, V, (B, S))
    label[:, 4:] = PAD
    return *(torch.randn(B, S, V, requires_grad=True) for _ in range(2)), label


def loss(logits1, logits2, label):
    p_loss = F.kl_div(F.log_softmax(logits1, dim=-1), F.softmax(logits2, dim=-1), reduction="none")
    with torch.no_grad():
        p_loss.masked_fill_(label.unsqueeze(-1).eq(PAD), 0.0)
    return p_loss.sum()


EXPECTED = """\
SOFT_TARGETS: The classes are weighed by softmax (p_loss = F.kl_div(F.log_softmax(logits1, dim=-1),
    F.softmax(logits2, dim=-1), reduction="none")) [2, 6, 48], of which a gradient is wanted. Detach the
    targets if they are meant as constants; no gradient reaches them through the kernels.
"""
