"""A blank that is no word: all other log-probabilities are scored as well, and in memory anyway.

Source: none; a transducer's scores of words, beside the loss of its blank
Family: Look-alikes
"""

import torch
import torch.nn.functional as F

N, V = 16, 48


def inputs():
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,)), torch.rand(N, V - 1)


def loss(logits, labels, scores):
    log_probs = F.log_softmax(logits, dim=-1)
    words = torch.tanh(log_probs[:, 1:] * scores).amax(-1)
    return F.nll_loss(log_probs, labels) - words.mean()


EXPECTED = """\
LOGITS_ESCAPE: The log_softmax of all classes [16x48] is also used by getitem (words =
    torch.tanh(log_probs[:, 1:] * scores).amax(-1)). Compute the loss from the logits, apart from the
    log-probabilities that you keep.
"""
