"""SpeechBrain: nll of log-probabilities, a mask made of relative lengths.

Source: speechbrain/speechbrain, speechbrain/nnet/losses.py
Family: Masks and weights
"""

import torch

B, S, V = 2, 8, 64


def inputs():
    return (3 * torch.randn(B, S, V)).requires_grad_(), torch.randint(V, (B, S)), torch.tensor([0.75, 1.0])


def loss(logits, targets, length):
    log_probs = logits.log_softmax(-1).transpose(1, -1)
    per_token = torch.nn.functional.nll_loss(log_probs, targets.long(), reduction="none")
    mask = torch.arange(S, device=length.device)[None, :] < (length * S)[:, None]
    mask = mask.type(per_token.dtype)
    return torch.sum(per_token * mask) / torch.sum(mask)


EXPECTED = """\
[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
