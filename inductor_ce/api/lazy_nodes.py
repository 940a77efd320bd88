"""The nodes that lazy logits have in autograd's graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import lazy_trees as trees
from .lazy_source import Source


class OfParts(torch.autograd.Function):
    """Lazy logits of their parts."""

    @staticmethod
    def forward(ctx: Any, kind: Any, source: Source, strides: Any, *parts: Tensor) -> Any:
        ctx.source, ctx.is_lazy = source, True
        return kind(source, strides)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        return None, None, None, *ctx.source.gradients(trees.made(upstream))


class OfParent(torch.autograd.Function):
    """Lazy logits that are a cast, a copy or another shape of lazy logits."""

    @staticmethod
    def forward(ctx: Any, parent: Any, source: Source, strides: Any) -> Any:
        ctx.is_lazy, ctx.dtype, ctx.shape = True, parent.dtype, parent.shape
        return type(parent)(source, strides)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        return upstream.to(ctx.dtype).reshape(ctx.shape), None, None


class OfLazy(torch.autograd.Function):
    """The logits of lazy ones."""

    @staticmethod
    def forward(ctx: Any, lazy: Any, made: Tensor) -> Tensor:
        return made.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        return upstream, None
