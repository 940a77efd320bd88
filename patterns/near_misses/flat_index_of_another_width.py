"""A padded vocabulary: flat indices that count rows by the words, where rows are as wide as the padding.

Source: none; a bug that runs, and reads other rows' logits
Family: Look-alikes
"""

import torch

N, WORDS, PADDED = 16, 45, 48


def inputs():
    return (2 * torch.randn(N, PADDED)).requires_grad_(), torch.randint(WORDS, (N,))


def loss(logits, words):
    log_probs = logits.log_softmax(-1)
    flat_index = torch.arange(N, device=words.device) * WORDS + words
    return -log_probs.view(-1)[flat_index].mean()


EXPECTED = """\
NOT_UNDERSTOOD: The result of log_softmax goes into view (return
    -log_probs.view(-1)[flat_index].mean()). No dimension of its result holds the classes of one row. If
    this is a cross entropy, write this step in one of the spellings that the README lists; if not, it
    runs as written.
"""
