"""Sentence Transformers 6: scores of all directions side by side, of which there is one; the diagonal picked.

Source: huggingface/sentence-transformers, sentence_transformer/losses/multiple_negatives_ranking.py
Family: Contrastive
"""

import torch
import torch.nn.functional as F

N, D = 16, 12


def inputs():
    return tuple(torch.randn(n, D, requires_grad=True) for n in (N, N, 2 * N))


def loss(anchors, positives, negatives, scale=20.0):
    documents = F.normalize(torch.cat([positives, negatives], dim=0), p=2, dim=1)
    similarities = {"query_to_doc": torch.mm(F.normalize(anchors, p=2, dim=1), documents.transpose(0, 1))}
    for key in similarities:
        similarities[key] = similarities[key] * scale
    rows = torch.arange(N)
    positive_scores = similarities["query_to_doc"][rows, rows]
    scores = torch.cat(list(similarities.values()), dim=1)
    return -(positive_scores - torch.logsumexp(scores, dim=1)).mean()


EXPECTED = """\
pick(y) - lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
