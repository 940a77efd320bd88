"""What lazy logits are made of, and whether it still is what it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.compat.graphs import is_fake, without_saved_tensors_hooks
from ..common.errors import LazyLogitsError
from ..rewriting.recipes import Recipe


class Source:
    """What logits [..., V] are made of: a recipe and its parts, the hidden states [..., D] first."""

    def __init__(self, recipe: Recipe, parts: Sequence[Tensor]):
        self.recipe, self.parts = recipe, tuple(parts)
        self._versions = tuple(map(_version, parts))
        self.graph: tuple[Tensor, list[Tensor]] | None = None  # the logits, and leaves in place of the parts

    @property
    def is_example(self) -> bool:
        """Whether this stands for others in a graph that is being captured."""
        return is_fake(self.parts[0])

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.parts[0].shape[:-1], self.recipe.classes)

    def check(self) -> None:
        """Raises LazyLogitsError where a part is no longer what it was."""
        if self.is_example:
            return
        for name, part, version in zip(self.recipe.parts, self.parts, self._versions, strict=True):
            if _is_freed(part):
                raise LazyLogitsError(_EXPIRED.format(name=name, fate="was freed since", when="backward"))
            if _version(part) != version:
                raise LazyLogitsError(
                    _EXPIRED.format(name=name, fate="was changed in place since", when="optimizer.step")
                )

    def make(self) -> Tensor:
        """The logits, without a gradient."""
        self.check()
        with torch.no_grad():
            return self.recipe.make(self.parts)

    def make_with_graph(self) -> Tensor:
        """The same, and `graph`, by which their gradient becomes that of the parts."""
        self.check()
        leaves = [part.detach().requires_grad_(part.requires_grad) for part in self.parts]
        # Hooks that are set where somebody looks first, as by a checkpoint, are for what is done there.
        with torch.enable_grad(), without_saved_tensors_hooks():
            made = self.recipe.make(leaves)
        self.graph = made, leaves
        return made.detach()

    def gradients(self, upstream: Tensor) -> list[Tensor | None]:
        """Those of the parts, for a gradient of the logits."""
        if self.graph is None:
            self.make_with_graph()
        assert self.graph is not None
        made, leaves = self.graph
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(made, wanted, upstream, retain_graph=True, allow_unused=True))
        return [next(found) if leaf.requires_grad else None for leaf in leaves]

    def of(self, hidden: Tensor) -> Source:
        """The same recipe on other hidden states, which are made of these."""
        self.check()
        return Source(self.recipe, [hidden, *self.parts[1:]])

    def detached(self) -> Source:
        self.check()
        return Source(self.recipe, [part.detach() for part in self.parts])

    def then(self, target: Callable[..., Any] | str, *args: Any, dtype: torch.dtype) -> Source:
        """The same with one more function of each row."""
        self.check()
        return Source(self.recipe.then(target, *args, dtype=dtype), self.parts)


_EXPIRED = (
    "These logits were returned lazily and can no longer be made: {name} {fate}. Read them before that, as "
    'before {when}(), or have them made with the loss: the option returned_logits="eager".'
)


def _version(part: Tensor) -> int:
    return -1 if part.is_inference() else part._version


def _is_freed(part: Tensor) -> bool:
    """Whether somebody took the memory away, as FSDP2 does with gathered weights."""
    return part.numel() > 0 and part.untyped_storage().size() == 0
