"""Lazy logits without a compiler: of hidden states and a weight, beside the same logits by plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inductor_ce.api.lazy_logits import LazyLogits
from inductor_ce.api.lazy_source import Source
from inductor_ce.rewriting.recipes import Instruction, Of, Recipe

B, T, D, V = 2, 5, 4, 16


class Case:
    """The same parts twice: `z` are lazy logits [B, T, V] of them, `eager` those of plain PyTorch."""

    def __init__(self, shape: tuple[int, ...] = (B, T), dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, dtype=dtype).requires_grad_()

        self.parts = [random(*shape, D), random(V, D)]
        self.copies = [part.detach().clone().requires_grad_() for part in self.parts]
        self.z = lazy(*self.parts)
        self.eager = capped(*self.copies)

    def same_gradients(self, **tolerance: float) -> None:
        for ours, theirs in zip(self.parts, self.copies, strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, **tolerance)


def capped(h: Tensor, W: Tensor) -> Tensor:
    return 3 * torch.tanh(F.linear(h, W) / 3)


def recipe(dtype: torch.dtype, classes: int = V) -> Recipe:
    """What makes `capped`."""
    steps = (
        Instruction(F.linear, (Of(0), Of(1))),
        Instruction("div", (Of(2), 3)),
        Instruction(torch.tanh, (Of(3),)),
        Instruction("mul", (Of(4), 3)),
    )
    autocast = ("cpu", torch.bfloat16, False)
    return Recipe(("the hidden states", "the weight [16x4]"), steps, classes, dtype, True, autocast)


def lazy(h: Tensor, W: Tensor) -> LazyLogits:
    return LazyLogits.returned(Source(recipe(h.dtype), [h, W]))


def rows_made(monkeypatch: Any) -> list[int]:
    """A list to which the number of rows is added whenever some are made."""
    made: list[int] = []
    make = Recipe.make

    def counted(self: Recipe, parts: Any) -> Tensor:
        logits = make(self, parts)
        made.append(logits.numel() // logits.shape[-1])
        return logits

    monkeypatch.setattr(Recipe, "make", counted)
    return made


def assert_same(ours: Any, theirs: Any, strides: bool = True) -> None:
    """The same tensors, in value and in what is told of them, or tuples of these, or other values."""
    if isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b, strides)
    elif isinstance(theirs, Tensor):
        told = [
            (x.shape, x.dtype, x.device, x.layout, x.requires_grad, x.is_leaf, x.dim(), x.numel())
            for x in (ours, theirs)
        ]
        assert told[0] == told[1]
        if strides:
            assert ours.stride() == theirs.stride()
        plain = ours.made() if isinstance(ours, LazyLogits) else ours
        torch.testing.assert_close(plain, theirs, rtol=0, atol=1e-12 if theirs.dtype == torch.float64 else 0)
    else:
        assert ours == theirs


def outcome(f: Callable[..., Any], *args: Any) -> Any:
    """What f gives, or the type of what it raises."""
    try:
        return f(*args)
    except Exception as error:
        return type(error)


class Scaled(torch.autograd.Function):
    """A gradient ten times that of the identity."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream * 10
