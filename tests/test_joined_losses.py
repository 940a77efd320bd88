"""Losses of chunks of rows, one for each row, that are glued together: one loss, whose head is in pieces."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import compile_without_codegen, sites
from head_cases import counts
from reference import assert_fair
from torch import Tensor

N, D, V, CHUNK = 22, 8, 50, 7
CHUNKS = {"strategy": "token_chunks", "memory_budget": 0.7}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def rows(z: Tensor, y: Tensor, **options: object) -> list[Tensor]:
    pieces = zip(z.split(CHUNK), y.split(CHUNK), strict=True)
    return [F.cross_entropy(a, b, reduction="none", **options) for a, b in pieces]  # type: ignore[arg-type]


def counted(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return torch.cat(rows(F.linear(h, w), y)).sum() / (y != -100).sum()


def smoothed(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return torch.cat(rows(F.linear(h, w), y, label_smoothing=0.1)).sum()


def smoothed_away(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The labels tell no more than which rows count."""
    return torch.cat(rows(F.linear(h, w), y, label_smoothing=1.0)).sum()


def another_ignored(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return torch.cat(rows(F.linear(h, w), y.clamp(min=3), ignore_index=3)).mean()


def in_chunks(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    pieces = zip(F.linear(h, w).chunk(4), y.chunk(4), strict=True)
    return torch.cat([F.cross_entropy(a, b, reduction="none") for a, b in pieces]).sum()


def in_slices(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    starts = range(0, N, CHUNK)
    pieces = [(z[i : i + CHUNK], y[i : i + CHUNK]) for i in starts]
    return torch.cat([F.cross_entropy(a, b, reduction="none") for a, b in pieces]).sum()


def of_one(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Picked of the logits, normalised behind a concatenation of them alone."""
    z = F.linear(h, w)
    lse = torch.logsumexp(torch.cat([z], dim=1), dim=1)
    return (lse - z[torch.arange(N), y.clamp(min=0)]).mean()


JOINED = {
    f.__name__: f for f in (counted, smoothed, smoothed_away, another_ignored, in_chunks, in_slices, of_one)
}


def backwards(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    weights = torch.arange(N, dtype=h.dtype)
    return (torch.cat(rows(F.linear(h, w), y)[::-1]) * weights).sum()


def of_other_labels(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The second chunk's labels are the first's."""
    z = F.linear(h, w)
    first, second = z[: N // 2], z[N // 2 :]
    pieces = [F.cross_entropy(piece, y[: N // 2], reduction="none") for piece in (first, second)]
    return torch.cat(pieces).square().sum()


def ignored_otherwise(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    first, second = F.linear(h, w).chunk(2)
    of_first, of_second = y.clamp(min=0).chunk(2)
    losses = [
        F.cross_entropy(first, of_first, reduction="none", ignore_index=0),
        F.cross_entropy(second, of_second, reduction="none"),
    ]
    return torch.cat(losses).sum()


def weighed(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    classes = torch.linspace(0.5, 1.5, V, dtype=h.dtype)
    return torch.cat(rows(F.linear(h, w), y, weight=classes)).sum()


def some_missing(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return torch.cat(rows(F.linear(h, w), y)[:-1]).sum()


def summed_apart(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    pieces = zip(F.linear(h, w).split(CHUNK), y.split(CHUNK), strict=True)
    return torch.stack([F.cross_entropy(a, b, reduction="sum") for a, b in pieces]).sum()


def told_apart_too(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    losses = rows(F.linear(h, w), y)
    return torch.cat(losses).sum() + losses[0].square().sum()


APART = {
    f.__name__: f
    for f in (
        *(backwards, of_other_labels, ignored_otherwise, weighed, some_missing, summed_apart),
        told_apart_too,
    )
}


def given() -> tuple[Tensor, Tensor, Tensor]:
    y = torch.randint(V, (N,))
    y[torch.tensor([0, 4, N - 1])] = -100
    return torch.randn(N, D), torch.randn(V, D), y


def measured(f: Loss, h: Tensor, w: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    leaves = [t.to(dtype).requires_grad_() for t in (h.clone(), w.clone())]
    value = f(*leaves, y)
    return value.detach(), *torch.autograd.grad(0.37 * value, leaves)


def assert_right(compiled: Loss, f: Loss, args: tuple[Tensor, Tensor, Tensor]) -> None:
    ours = measured(compiled, *args, torch.float32)
    naive, exact = (measured(f, *args, dtype) for dtype in (torch.float32, torch.float64))
    for o, n, e in zip(ours, naive, exact, strict=True):
        assert_fair(o, n, e)


@pytest.mark.parametrize("name", JOINED)
def test_one_head(name: str) -> None:
    f = JOINED[name]
    compiled, _ = compile_without_codegen(f, **CHUNKS)
    assert_right(compiled, f, given())
    assert sites() == 1
    assert counts() == {"token_chunks": 1}


def test_verified() -> None:
    """Beside the original, which is the concatenation."""
    compiled, _ = compile_without_codegen(counted, verify=True)
    assert_right(compiled, counted, given())
    assert sites() == 1


@pytest.mark.parametrize("name", APART)
def test_right_where_they_are_no_one_loss(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A piece of several, as split gives them, is passed over by what looks for padding: nothing fails."""
    f = APART[name]
    compiled, _ = compile_without_codegen(f, **CHUNKS)
    with caplog.at_level(logging.ERROR, "inductor_ce"):
        assert_right(compiled, f, given())
    assert not caplog.records
