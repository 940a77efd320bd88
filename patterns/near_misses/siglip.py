"""SigLIP: every pair of the batch is a binary question; there is no normaliser.

Source: mlfoundations/open_clip, src/open_clip/loss.py
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, D = 32, 12


def inputs():
    image, text = torch.randn(N, D, requires_grad=True), torch.randn(N, D, requires_grad=True)
    return image, text, torch.tensor(2.3, requires_grad=True), torch.tensor(-10.0, requires_grad=True)


def loss(image, text, log_scale, bias):
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits = log_scale.exp() * image @ text.t() + bias
    return -F.logsigmoid((2 * torch.eye(N) - 1) * logits).sum() / N


EXPECTED = """\
nothing to fuse
"""
