"""A linear cross entropy proposed for PyTorch: the weight in chunks of classes, a running maximum, smoothing.

Source: ryanzhou147/pytorch, aten/src/ATen/native/LinearCrossEntropy.cpp
Family: Classes in blocks
"""

import torch
import torch.nn.functional as F

N, V, D, CHUNK = 24, 60, 8, 16


def inputs():
    target = torch.randint(V, (N,))
    target[::5] = -100
    target[1], target[2], target[3] = 0, CHUNK, V - 1
    return (
        torch.randn(N, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        torch.randn(V, requires_grad=True),
        target,
    )


def loss(input, linear_weight, linear_bias, target, label_smoothing=0.1, ignore_index=-100):
    vocab_size = linear_weight.size(0)
    valid = target != ignore_index
    running_max = torch.full((input.size(0),), float("-inf"), dtype=input.dtype)
    exp_sums = torch.zeros(input.size(0), dtype=input.dtype)
    target_logits = torch.zeros(input.size(0), dtype=input.dtype)
    sum_logits = torch.zeros(input.size(0), dtype=input.dtype)
    for start in range(0, vocab_size, CHUNK):
        end = min(start + CHUNK, vocab_size)
        logits = F.linear(input, linear_weight[start:end], linear_bias[start:end])
        sum_logits = sum_logits + logits.sum(-1)

        new_max = torch.maximum(running_max, logits.max(-1)[0])
        exp_chunk = torch.exp(logits - new_max.unsqueeze(-1)).sum(-1)
        exp_sums = exp_sums * torch.exp(running_max - new_max) + exp_chunk
        running_max = new_max

        here = torch.logical_and(valid, torch.ge(target, start))
        here = torch.logical_and(here, torch.lt(target, end))
        local = torch.where(here, target - start, 0)
        gathered = logits.gather(1, local.unsqueeze(1)).squeeze(1)
        target_logits = torch.where(here, gathered, target_logits)

    logsumexp = running_max + torch.log(exp_sums)
    losses = logsumexp - target_logits * (1 - label_smoothing) - sum_logits * (label_smoothing / vocab_size)
    return losses.masked_fill(~valid, 0).sum() / valid.sum()


EXPECTED = """\
lse
pick(y)
0.0016666666666666668*sum
row_stats: max,sumexp,pick,sum
sharded: all_gather [4, N]
"""
