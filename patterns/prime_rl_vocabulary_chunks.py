"""prime-rl: log-probabilities of the tokens, a temperature for each, the head in chunks of the vocabulary.

Source: PrimeIntellect-ai/prime-rl, src/prime_rl/trainer/models/layers/lm_head.py
Family: Classes in blocks
"""

import torch

B, S, V, D, CHUNK = 3, 8, 60, 8, 16


def inputs():
    labels = torch.randint(V, (B, S))
    labels[0, :3] = torch.tensor([0, CHUNK - 1, V - 1])
    temperature = torch.rand(B, S) + 0.5
    mask = torch.rand(B, S) > 0.3
    return (
        torch.randn(B, S, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        labels,
        temperature,
        torch.randn(B, S),
        mask,
    )


def update(maximum, total, logits):
    new_maximum = torch.maximum(maximum, torch.amax(logits, dim=-1))
    total = total * torch.exp(maximum - new_maximum)
    return new_maximum, total + torch.exp(logits - new_maximum.unsqueeze(-1)).sum(dim=-1)


def loss(hidden_states, weight, labels, temperature, advantages, loss_mask):
    batch, seq_len, size = hidden_states.shape
    hidden = hidden_states.reshape(batch * seq_len, size).contiguous()
    labels = labels.reshape(batch * seq_len).contiguous()
    inv_temperature = (1.0 / temperature.reshape(batch * seq_len)).contiguous()

    m = torch.full((hidden.shape[0],), float("-inf"), dtype=hidden.dtype)
    s = torch.zeros_like(m)
    target = torch.zeros_like(m)
    for start in range(0, weight.shape[0], CHUNK):
        w_chunk = weight[start : min(start + CHUNK, weight.shape[0])]
        logits = (hidden @ w_chunk.t()) * inv_temperature.unsqueeze(-1)
        m, s = update(m, s, logits)
        in_chunk = (labels >= start) & (labels < start + w_chunk.shape[0])
        local = (labels - start).clamp(0, w_chunk.shape[0] - 1)
        picked = logits.gather(1, local.unsqueeze(1)).squeeze(1)
        target = target + torch.where(in_chunk, picked, torch.zeros_like(picked))

    logprobs = (target - (m + torch.log(s))).reshape(batch, seq_len)
    return -(logprobs * advantages * loss_mask).sum() / loss_mask.sum()


EXPECTED = """\
pick(y)
lse
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
