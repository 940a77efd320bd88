"""Forward correction of noisy labels: the log of probabilities times a matrix from class to class.

Source: none named; the formula of Patrini et al., Making Deep Neural Networks Robust to Label Noise
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, V = 12, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randn(V, V).softmax(dim=1), torch.randint(V, (N,))


def loss(logits, transition, noisy_labels):
    probs = F.softmax(logits, dim=1)
    return F.nll_loss(torch.log(probs @ transition), noisy_labels)


EXPECTED = """\
EACH_ENTRY: The result of softmax goes into matmul (return F.nll_loss(torch.log(probs @ transition),
    noisy_labels)), which weighs the classes by a matrix. Each entry of a row is needed there by itself,
    so it runs as written.
"""
