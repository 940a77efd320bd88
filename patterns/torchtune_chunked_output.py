"""torchtune: logits in chunks along the sequence, each upcast, the sums over the number of tokens.

Source: pytorch/torchtune, torchtune/modules/loss/ce_chunked_output_loss.py
Family: Autocast, checkpoints, chunks
"""

import torch
import torch.nn.functional as F

B, S, V, CHUNKS = 2, 8, 64, 4


def inputs():
    labels = torch.randint(V, (B, S))
    labels[:, -1] = -100
    return torch.randn(B, S, V).bfloat16().requires_grad_(), labels


def loss(logits, labels, ignore_index=-100):
    total_elements = (labels != ignore_index).sum()
    label_chunks = [chunk.reshape(-1) for chunk in labels.chunk(CHUNKS, dim=1)]
    logit_chunks = [chunk.reshape(-1, chunk.size(-1)) for chunk in logits.chunk(CHUNKS, dim=1)]
    total = 0.0
    for piece, piece_labels in zip(logit_chunks, label_chunks):
        total = total + F.cross_entropy(
            piece.float(), piece_labels, ignore_index=ignore_index, reduction="sum"
        )
    return total / total_elements


EXPECTED = """\
sum[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
sum[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
sum[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
sum[y != -100](lse - pick(y))
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
