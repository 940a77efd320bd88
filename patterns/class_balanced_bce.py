"""Class-balanced loss: binary cross entropy of softmax and one-hot target, rows weighed by their class.

Source: vandit15/Class-balanced-loss-pytorch, class_balanced_loss.py
Family: Each entry
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    samples = torch.randint(500, 5000, (V,)).float()  # of few, 1 - beta^n is all rounding
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,)), samples


def loss(logits, labels, samples_per_cls, beta=0.999):
    no_of_classes = logits.shape[1]
    weights = (1.0 - beta) / (1.0 - torch.pow(beta, samples_per_cls))
    weights = weights / torch.sum(weights) * no_of_classes
    labels_one_hot = F.one_hot(labels, no_of_classes).float()
    weights = weights.unsqueeze(0)
    weights = weights.repeat(labels_one_hot.shape[0], 1) * labels_one_hot
    weights = weights.sum(1)
    weights = weights.unsqueeze(1)
    weights = weights.repeat(1, no_of_classes)
    pred = logits.softmax(dim=1)
    return F.binary_cross_entropy(input=pred, target=labels_one_hot, weight=weights)


EXPECTED = """\
mean(sum binary_cross_entropy(p, t)*t2)
row_stats: max,sumexp
sharded: left as written
"""
