"""Logits of steps, or of parts of the rows, that are joined for a loss: numbers, heads, what is left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gallery import check_numbers, run
from harness import compile_without_codegen
from head_cases import counts
from torch import Tensor

N, S, V, D = 5, 4, 24, 6

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    leaves = (torch.randn(size).to(dtype).requires_grad_() for size in ((N, S, D), (V, D), (V,)))
    y = torch.randint(V, (N, S))
    y[0, :2] = -100
    return *leaves, y


def ce(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.reshape(-1, V), y.reshape(-1))


def decoder(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """A recurrent one, whose steps are stacked."""
    state, outputs = h[:, 0] * 0, []
    for t in range(S):
        state = torch.tanh(state + h[:, t])
        outputs.append(F.linear(state, w, b))
    return ce(torch.stack(outputs, 1), y)


def put_in_front(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = torch.cat([(h[:, t] @ w.t()).unsqueeze(1).float() for t in range(S)], dim=1)
    return F.cross_entropy(z.transpose(1, 2), y)


def time_first(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return ce(torch.stack([torch.mm(h[:, t].exp(), w.t()) for t in range(S)]), y.t())


def in_chunks(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = torch.cat([F.linear(part, w).float() for part in h.flatten(0, 1).split(7)])
    return ce(20 * torch.tanh(z / 20), y)


def two_batches(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = torch.cat([F.linear(h, w, b), F.linear(h.flip(1) * 2, w, b)])
    log_p = z.log_softmax(-1).gather(-1, torch.cat([y, y]).clamp(min=0)[..., None])[..., 0].sum(-1)
    return -F.logsigmoid(log_p[:N] - log_p[N:]).mean()


def one_twice(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    return ce(torch.cat([z, F.linear(h * 2, w), z]), torch.cat([y, y, y]))


def capped_one_by_one(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = [5 * torch.tanh(F.linear(part, w).float() / 5) for part in h.chunk(2, 1)]
    return ce(torch.cat(z, 1).clamp(-4, 4), y)


def cut_one_by_one(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Prompts of other lengths, and a shift."""
    z = torch.cat([F.linear(h, w, b)[:, :-1] * 2, F.linear(h * 2, w, b)[:, 1:] * 2])
    return ce(z, torch.cat([y[:, 1:], y[:, 1:]]))


def written_one_by_one(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    state, outputs = h[:, 0] * 0, torch.zeros(N, S, V)
    for t in reversed(range(S)):
        state = torch.tanh(state + h[:, t])
        outputs[:, t] = F.linear(state, w, b)
    return ce(outputs, y)


def written_but_the_first(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """As a tutorial has it."""
    state, outputs = h[:, 0], torch.zeros(S, N, V).to(h.device)
    for t in range(1, S):
        state = torch.tanh(state + h[:, t])
        outputs[t] = F.linear(state, w, b)
    return ce(outputs[1:].view(-1, V), y.t()[1:])


def under_autocast(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        z = torch.cat([F.linear(part, w) for part in h.chunk(2, 1)], 1)
    return ce(z.float(), y)


def beside_other_joins(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Of what a number comes before, and of copies whose source is named."""
    parts = [F.linear(part, w) for part in h.chunk(2, 1)]
    others = torch.cat([1 - w.sigmoid(), torch.clone(input=w)])
    return ce(torch.cat(parts, 1), y) + others.mean()


JOINED = [
    beside_other_joins,
    decoder,
    put_in_front,
    time_first,
    in_chunks,
    two_batches,
    one_twice,
    capped_one_by_one,
    cut_one_by_one,
    written_one_by_one,
    written_but_the_first,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("f", JOINED)
def test_numbers(f: Loss, dtype: torch.dtype) -> None:
    compiled, graphs = compile_without_codegen(f, strategy="token_chunks", memory_budget=0.5)
    args = given(dtype)
    check_numbers(run(compiled, args), f, args)
    assert set(counts()) <= {"token_chunks", "vocab_slabs"}
    assert graphs.pieces >= 2
    assert not graphs.report.misses


def test_under_autocast() -> None:
    compiled, _ = compile_without_codegen(under_autocast, strategy="token_chunks", memory_budget=0.5)
    h, w, b, y = given()
    measured = []
    for f in (compiled, under_autocast):
        loss = f(h, w, b, y)
        measured.append((loss, *torch.autograd.grad(loss, (h, w))))
    torch.testing.assert_close(*measured, rtol=2e-2, atol=2e-3)
    assert counts() == {"token_chunks": 1}


# What is left


def sampled(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """A step's logits are read by the next step."""
    state, outputs = h[:, 0], []
    for t in range(S):
        outputs.append(F.linear(state, w))
        state = torch.tanh(h[:, t] + w[outputs[-1].argmax(-1)])
    return ce(torch.stack(outputs, 1), y)


def two_weights(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return ce(torch.cat([F.linear(h[:, :2], w), F.linear(h[:, 2:], w * 2)], 1), y)


def a_weight_that_is_edited(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    scale = w.detach().clone()
    first = F.linear(h[:, :2].detach(), scale)
    scale.mul_(2)
    return ce(torch.cat([first, F.linear(h[:, 2:], scale)], 1), y)


def without_a_gradient_for_some(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        first = F.linear(h[:, :2], w)
    return ce(torch.cat([first, F.linear(h[:, 2:], w)], 1), y)


def copied_without_a_gradient(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    first = F.linear(h[:, :2], w)
    with torch.no_grad():
        first = first.double()
    return ce(torch.cat([first, F.linear(h[:, 2:], w).double()], 1), y)


def copies_of_a_weight_that_is_edited(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    scale = w.detach().clone()
    first = F.linear(h[:, :2], scale.clone())
    scale.mul_(2)
    return ce(torch.cat([first, F.linear(h[:, 2:], scale.clone())], 1), y)


def a_view_of_the_weight_without_a_gradient(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        columns = w.t()
    return ce(torch.cat([h[:, :2] @ columns, h[:, 2:] @ w.t()], 1), y)


def with_a_bias_for_each_row(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    h, bias = h.flatten(0, 1), b * torch.arange(N * S / 2)[:, None]
    return ce(torch.cat([F.linear(part, w, bias) for part in h.chunk(2)]), y)


def into_a_buffer(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        z = torch.cat([F.linear(h[:, :2], w), F.linear(h[:, 2:], w)], 1, out=torch.empty(N, S, V))
    return ce(z, y) + h.exp().mean() + 0 * w.sum()


def along_the_classes(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(
        torch.stack([F.linear(h, w), F.linear(h * 2, w)], -1).flatten(0, 1).sum(-1), y.flatten()
    )


def no_loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return torch.cat([F.linear(h, w), F.linear(h * 2, w)]).sigmoid().mean()


def capped_otherwise(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = [c * torch.tanh(F.linear(part, w) / c) for c, part in zip((4, 5), h.chunk(2, 1), strict=True)]
    return ce(torch.cat(z, 1), y)


def turned_otherwise(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """The same numbers in other places."""
    return ce(torch.cat([F.linear(h[:, :2], w) / 2, 2 / F.linear(h[:, 2:], w)], 1), y)


def writes(outputs: Tensor, h: Tensor, w: Tensor, first: int = 0) -> Tensor:
    for t in range(first, S):
        outputs[:, t] = F.linear(h[:, t], w)
    return outputs


def read_where_nothing_is_written(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return ce(writes(torch.zeros(N, S, V), h, w, 1), y)


def read_in_between(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    outputs = torch.zeros(N, S, V)
    outputs[:, 0] = F.linear(h[:, 0], w)
    early = outputs.detach().exp().mean()
    return ce(writes(outputs, h, w, 1), y) + early


def written_into_what_is_given(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    given = torch.empty(N, S, V)
    outputs = writes(torch.zeros(N, S, V, out=given), h.detach(), w.detach())
    return ce(outputs, y) + given.exp().mean() + 0 * (h.sum() + w.sum())


def added_to(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    outputs = writes(torch.zeros(N, S, V), h, w)
    outputs[:, 1].add_(b)
    return ce(outputs, y)


def written_without_a_gradient(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    outputs, first = torch.zeros(N, S, V), F.linear(h[:, 0], w)
    with torch.no_grad():
        outputs[:, 0] = first
    return ce(writes(outputs, h, w, 1), y)


LEFT = [
    capped_otherwise,
    turned_otherwise,
    read_where_nothing_is_written,
    read_in_between,
    written_into_what_is_given,
    added_to,
    written_without_a_gradient,
    sampled,
    two_weights,
    a_weight_that_is_edited,
    without_a_gradient_for_some,
    copied_without_a_gradient,
    copies_of_a_weight_that_is_edited,
    a_view_of_the_weight_without_a_gradient,
    with_a_bias_for_each_row,
    into_a_buffer,
    along_the_classes,
    no_loss,
]


@pytest.mark.parametrize("f", LEFT)
def test_left(f: Loss, caplog: pytest.LogCaptureFixture) -> None:
    compiled, graphs = compile_without_codegen(f, strategy="token_chunks", memory_budget=0.5)
    args = given()
    check_numbers(run(compiled, args), f, args)
    assert graphs.pieces <= 1 or f is along_the_classes
    assert "failed" not in caplog.text
