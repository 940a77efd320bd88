"""What sums over the classes are computed with: tensors here, Inductor's loops in `divergence_loops.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Arithmetic(Protocol[T]):
    """What the formulas are computed with, over tensors or in Inductor's loops."""

    def add(self, a: T, b: T | float) -> T: ...
    def sub(self, a: T, b: T) -> T: ...
    def mul(self, a: T, b: T | float) -> T: ...
    def div(self, a: T, b: T) -> T: ...
    def exp(self, a: T) -> T: ...
    def log(self, a: T) -> T: ...
    def call(self, name: str, *args: Any, like: T) -> T:
        """A function of `algebra.entries`; numbers are in the dtype of `like`."""

    def unless_zero(self, p: T, x: T) -> T:
        """x, but 0 where p is 0."""

    def once(self, row: T) -> T:
        """A number of each row, made once and not for each of its entries."""

    def over_classes(self, row: T) -> T:
        """A number of each row beside all of its entries."""

    def as_entries(self, row: T, like: T) -> T:
        """The same as entries, of which there are as many as in `like`."""

    def total(self, a: T) -> T:
        """The sum over the classes."""


@dataclass(frozen=True)
class Normalised(Generic[T]):
    """The logits of a side, and of each row their maximum, log d and 1 / d."""

    z: T
    m: T
    logd: T
    scale: T

    def logarithm_and_probability(self, do: Arithmetic[T]) -> tuple[T, T]:
        """log p, and p as exp(z - m) / d: not as the exponential of its logarithm, which has been rounded."""
        gap = self.gap(do)
        log_p = do.sub(gap, do.over_classes(self.logd))
        return log_p, do.mul(do.exp(gap), do.over_classes(self.scale))

    def gap(self, do: Arithmetic[T]) -> T:
        """z - m"""
        return do.sub(self.z, do.over_classes(self.m))

    def log_ratio(self, do: Arithmetic[T], other: Normalised[T]) -> T:
        """log p - log p' of another side. log(d / d') is a small number, and so is its rounding."""
        ratio = do.once(do.log(do.div(self.scale, other.scale)))
        return do.add(do.sub(self.gap(do), other.gap(do)), do.over_classes(ratio))


@dataclass(frozen=True)
class Operands(Generic[T]):
    """The sides, and what `algebra.entries` reads beside them: tensors [N, V], and numbers of rows [N]."""

    sides: Sequence[Normalised[T]]
    tensors: Sequence[T] = ()
    numbers: Sequence[T] = ()


class Tensors:
    """Arithmetic of tensors."""

    add, sub, mul = staticmethod(torch.add), staticmethod(torch.sub), staticmethod(torch.mul)
    div, exp, log = staticmethod(torch.div), staticmethod(torch.exp), staticmethod(torch.log)

    @staticmethod
    def call(name: str, *args: Any, like: Tensor) -> Tensor:
        if name == "number":
            return args[0].to(like.dtype)
        if name == "clamp":
            return torch.clamp(*args[:3])
        if name != "pow":
            args = tuple(arg if isinstance(arg, Tensor) else like.new_full((), arg) for arg in args)
        function: Callable[..., Tensor] = getattr(torch, _NAMES.get(name, name))
        return function(*args)

    @staticmethod
    def unless_zero(p: Tensor, x: Tensor) -> Tensor:
        return torch.where(p == 0, 0.0, x)

    @staticmethod
    def once(row: Tensor) -> Tensor:
        return row

    @staticmethod
    def over_classes(row: Tensor) -> Tensor:
        return row.unsqueeze(-1)

    @staticmethod
    def as_entries(row: Tensor, like: Tensor) -> Tensor:
        return row.unsqueeze(-1).expand_as(like)

    @staticmethod
    def total(a: Tensor) -> Tensor:
        return a.sum(-1)


_NAMES = {"and": "logical_and", "or": "logical_or", "not": "logical_not"}
