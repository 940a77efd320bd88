"""fairseq: hypotheses rescored by their summed log-probability over a power of their length.

Source: facebookresearch/fairseq, fairseq/sequence_scorer.py
Family: Log-probabilities
"""

import torch

B, BEAM, S, V = 2, 3, 6, 64


def inputs():
    lengths = torch.randint(2, S + 1, (B, BEAM, 1))
    return torch.randn(B, BEAM, S, V, requires_grad=True), torch.randint(V, (B, BEAM, S)), lengths


def loss(logits, hypotheses, lengths, penalty=0.6):
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    positional = logprobs.gather(dim=-1, index=hypotheses.unsqueeze(-1)).squeeze(-1)
    mask = torch.arange(S, device=lengths.device) < lengths
    scores = positional.masked_fill(~mask, 0.0).sum(-1) / lengths.squeeze(-1) ** penalty
    return scores, scores.argmax(-1)


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
