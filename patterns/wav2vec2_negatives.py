"""wav2vec 2.0: similarities to the target and its distractors, equal distractors at -inf, time in front.

Source: facebookresearch/fairseq, models/wav2vec/wav2vec2.py and criterions/wav2vec_criterion.py
Family: Contrastive
"""

import torch
import torch.nn.functional as F

B, T, K, D = 2, 6, 47, 8


def inputs():
    negatives = torch.randn(K, B, T, D)
    targets = torch.randn(B, T, D)
    negatives[3] = targets
    return torch.randn(B, T, D, requires_grad=True), targets, negatives


def loss(x, y, negatives, logit_temp=0.1):
    neg_is_pos = (y == negatives).all(-1)
    candidates = torch.cat([y.unsqueeze(0), negatives], dim=0)
    logits = torch.cosine_similarity(x.float(), candidates.float(), dim=-1) / logit_temp
    positive, rest = logits[:1], logits[1:].masked_fill(neg_is_pos, float("-inf"))
    logits = torch.cat([positive, rest], dim=0).transpose(0, 2).reshape(-1, K + 1)
    return F.cross_entropy(logits, logits.new_zeros(logits.size(0), dtype=torch.long), reduction="sum")


EXPECTED = """\
sum[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
