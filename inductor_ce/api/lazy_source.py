"""What lazy logits are made of, and whether it still is what it was."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..common.compat.graphs import is_fake, local_of, without_saved_tensors_hooks
from ..common.errors import LazyLogitsError
from ..rewriting.recipes import Recipe


class Source:
    """What logits [..., V] are made of: a recipe and its parts, the hidden states [..., D] first.

    `watched` are the tensors in whose memory the parts are, DTensors, whose edits the parts do not count.
    """

    def __init__(self, recipe: Recipe, parts: Sequence[Tensor], watched: Sequence[Tensor] = ()):
        self.recipe, self.parts, self.watched = recipe, tuple(parts), tuple(watched)
        self._versions = tuple(map(_version, (*self.parts, *self.watched)))
        self._stepped: set[int] = set()  # the places in `watched` of what an optimizer has stepped
        self.graph: tuple[Tensor, list[Tensor]] | None = None  # the logits, and leaves in place of the parts
        if watched:
            _see_steps()
            with _WATCHING:
                _watching.add(self)

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
        held = (*self.parts, *self.watched)
        for i, (part, version) in enumerate(zip(held, self._versions, strict=True)):
            name = self.recipe.parts[i % len(self.parts)]
            if _is_freed(part):
                raise LazyLogitsError(_EXPIRED.format(name=name, fate="was freed since", when="backward"))
            if _version(part) != version or i - len(self.parts) in self._stepped:
                raise LazyLogitsError(
                    _EXPIRED.format(name=name, fate="was changed in place since", when="optimizer.step")
                )

    @property
    def is_spent(self) -> bool:
        """Whether a part is no longer what it was."""
        try:
            self.check()
        except LazyLogitsError:
            return True
        return False

    def see_step(self, stepped: set[int]) -> None:
        """An optimizer has changed tensors of these ids."""
        self._stepped |= {i for i, part in enumerate(self.watched) if id(part) in stepped}

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

    def again(self, recipe: Recipe | None = None, parts: Sequence[Tensor] | None = None) -> Source:
        """The same, with another recipe or other parts, as it is now."""
        self.check()
        return Source(recipe or self.recipe, self.parts if parts is None else parts, self.watched)

    def of(self, hidden: Tensor) -> Source:
        """The same recipe on other hidden states, which are made of these."""
        return self.again(parts=[hidden, *self.parts[1:]])

    def detached(self) -> Source:
        return self.again(parts=[part.detach() for part in self.parts])

    def then(self, target: Callable[..., Any] | str, *args: Any, **facts: Any) -> Source:
        """The same with one more function of each row, which gives other facts: a dtype, classes."""
        return self.again(recipe=self.recipe.then(target, *args, **{"dtype": self.recipe.dtype, **facts}))


# NOTE Steps of optimizers. They edit lists of DTensors at once, by torch._foreach_add_ and the like, which
# changes no version in torch 2.13. So optimizers are asked to tell of their steps.
_watching: weakref.WeakSet[Source] = weakref.WeakSet()
_WATCHING = threading.Lock()


@functools.cache
def _see_steps() -> None:
    register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    with _WATCHING:
        sources = list(_watching)
    for source in sources:
        source.see_step(stepped)


_EXPIRED = (
    "These logits were returned lazily and can no longer be made: {name} {fate}. Read them before that, as "
    'before {when}(), or have them made with the loss: the option returned_logits="eager".'
)


def _version(part: Tensor) -> int:
    return -1 if part.is_inference() else part._version


def _is_freed(part: Tensor) -> bool:
    """Whether somebody took the memory away, as FSDP2 does with gathered weights."""
    part = local_of(part)
    return part.numel() > 0 and part.untyped_storage().size() == 0
