"""AllenNLP, CopyNet: one softmax over vocabulary and source, a pick of the one, copies of the other.

Source: allenai/allennlp-models, allennlp_models/generation/models/copynet_seq2seq.py
Family: Log-probabilities
"""

import torch
import torch.nn.functional as F

B, T, V, S = 2, 5, 48, 9
TINY = 1e-13


def inputs():
    generated, copied = (torch.randn(B, T, n, requires_grad=True) for n in (V, S))
    copy_mask = torch.ones(B, S)
    copy_mask[0, -2:] = 0
    return generated, copied, copy_mask, torch.randint(V, (B, T)), torch.rand(B, T, S) > 0.8


def loss(generation_scores, copy_scores, copy_mask, target_tokens, target_to_source):
    shape = copy_scores.shape
    mask = torch.cat([torch.ones_like(generation_scores), copy_mask[:, None].expand(shape)], dim=-1)
    all_scores = torch.cat((generation_scores, copy_scores), dim=-1)
    log_probs = F.log_softmax(all_scores + (mask + TINY).log(), dim=-1)
    copy_log_probs = log_probs[..., generation_scores.size(-1) :] + (target_to_source + TINY).log()
    gen_mask = target_to_source.sum(-1) == 0
    log_gen_mask = (gen_mask + TINY).log().unsqueeze(-1)
    generation_log_probs = log_probs.gather(-1, target_tokens.unsqueeze(-1)) + log_gen_mask
    combined = torch.cat((generation_log_probs, copy_log_probs), dim=-1)
    return -torch.logsumexp(combined, dim=-1).sum(-1).mean()


EXPECTED = """\
max
lse - max
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
lse
row_stats: max,sumexp
sharded: all_gather [2, N]
"""
