"""Recipes: how logits that a graph returns are made again from what they were made of.

    z = chain(product(h, W))      with h [..., D], W [V, D], and a chain of casts, scale, bias, soft-cap

A row of such logits is made of the same row of the hidden states and of things that no row has for itself, so
rows can be made in any number and order. A recipe is data: graphs from caches and later calls of one
compiled function have equal ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..common.compat.graphs import enter_autocast, exit_autocast
from ..graph.builder import Builder
from ..graph.shapes import shape_of


@dataclass(frozen=True)
class Of:
    """In the arguments of a step: the value of this number, parts first, then the results of steps."""

    index: int


@dataclass(frozen=True)
class Instruction:
    """A torch callable, or the Tensor method of a name, and its arguments."""

    target: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Logits [..., V] from parts, of which the first are the hidden states [..., D].

    Attributes:
        parts: what the parts are called in messages.
        steps: what is done; the last result are the logits of rows [n, V].
        classes: V.
        dtype: of the logits.
        requires_grad: whether a gradient goes from them to the parts.
        autocast: (device type, dtype, whether it is on) under which the steps run.
    """

    parts: tuple[str, ...]
    steps: tuple[Instruction, ...]
    classes: int
    dtype: torch.dtype
    requires_grad: bool
    autocast: tuple[str, torch.dtype, bool]

    def make(self, parts: Sequence[Tensor]) -> Tensor:
        """The logits [..., V], contiguous, of hidden states [..., D] and the other parts."""
        hidden, *others = parts
        lead = hidden.shape[:-1]
        values: list[Any] = [hidden.reshape(-1, hidden.shape[-1]), *others]
        device, dtype, enabled = self.autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            for step in self.steps:
                args, kwargs = _filled(step.args, values), _filled(dict(step.kwargs), values)
                if isinstance(step.target, str):
                    receiver, *args = args
                    values.append(getattr(receiver, step.target)(*args, **kwargs))
                else:
                    values.append(step.target(*args, **kwargs))
        return values[-1].reshape(*lead, self.classes)

    def nodes(self, build: Builder, parts: Sequence[Node]) -> Node:
        """The same in a graph: the logits of parts that are nodes of it.

        The rows stay as they are arranged, as in a program that has both: rows may be cut behind the layer.
        """
        hidden, *others = parts
        lead = shape_of(hidden)[:-1]
        rows = hidden if len(lead) == 1 else self._rows(build, hidden)
        values: list[Any] = [rows, *others]
        with self._autocast(build):
            for step in self.steps:
                args, kwargs = _filled(step.args, values), _filled(dict(step.kwargs), values)
                values.append(build(step.target, *args, **kwargs))
        made = values[-1]
        if len(shape_of(made)) == len(lead) + 1:
            return made
        sizes = [s if isinstance(s, int) else build("size", hidden, i) for i, s in enumerate(lead)]
        return build("view", made, *sizes, self.classes)

    def _rows(self, build: Builder, hidden: Node) -> Node:
        """Hidden states as its steps take them, one behind the other in memory, for one product of all."""
        if len(shape_of(hidden)) == 1:
            return build("unsqueeze", hidden, 0)
        if any(step.target is torch.addmm for step in self.steps):
            return build("flatten", hidden, 0, -2)
        return build("contiguous", hidden)

    @contextlib.contextmanager
    def _autocast(self, build: Builder) -> Iterator[None]:
        """The nodes that are built within run under the autocast of the recipe."""
        device, dtype, enabled = self.autocast
        here = torch.is_autocast_enabled(device)
        if here == enabled and (not here or torch.get_autocast_dtype(device) == dtype):
            yield
            return
        entered = build(enter_autocast, device, dtype, enabled, False)
        try:
            yield
        finally:
            build(exit_autocast, entered)

    def then(
        self, target: Callable[..., Any] | str, *args: Any, dtype: torch.dtype, classes: int | None = None
    ) -> Recipe:
        """The same with one more step, a function of each row of the logits, which may have other classes."""
        last = Of(len(self.parts) + len(self.steps) - 1)
        steps = (*self.steps, Instruction(target, (last, *args)))
        return replace(self, steps=steps, dtype=dtype, classes=self.classes if classes is None else classes)


def _filled(value: Any, values: list[Any]) -> Any:
    if isinstance(value, Of):
        return values[value.index]
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(v, values) for v in value)
    if isinstance(value, dict):
        return {name: _filled(v, values) for name, v in value.items()}
    return value
