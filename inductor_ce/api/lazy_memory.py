"""In which memory lazy logits are, and whether somebody has written there.

Lazy logits that are a view are linked to what they are of. Before somebody writes to either, or is given a
tensor in its memory and may write there, the view is put into the memory of the other (`join`). Views that
had been made elsewhere are made again, of what was written, when they are read next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.compat.graphs import without_torch_function, without_transforms
from ..common.errors import LazyLogitsError
from .lazy_nodes import OfLazy
from .lazy_source import Source
from .lazy_trees import memory_of

Given = list[tuple[Tensor, int]]  # tensors that somebody may write to, and their versions

_MAKING = threading.RLock()  # one reader makes, the others wait
_BEFORE_THE_EDIT = -1

_SHARED = (
    "Logits that were returned lazily are written to, and another result of the compiled "
    'function would share memory with them. Use the option returned_logits="eager".'
)
_WATCHED = (
    "Logits that were returned lazily are written to while they, or a view of them, have hooks "
    'or retain their gradient. Use the option returned_logits="eager".'
)


class InMemory(Tensor):
    """What lazy logits know of their memory."""

    _source: Source
    _made: Tensor | None
    _made_version: int
    _parent: Any  # of which this is another form
    _viewed: InMemory | None  # of which this is a view
    _is_whole: bool  # whether this is all of that
    _path: Callable[[Tensor], Tensor]  # from the logits of either to these
    _has_joined: bool  # whether it is in the memory of that, and has the gradient of what is written there
    _is_exposed: bool
    _given: Given | None  # away, of results in one memory
    _is_bound: bool  # whether somebody may write to it by a view that hooks are on

    @property
    def is_made(self) -> bool:
        return self._made is not None

    def made(self) -> Tensor:
        """All logits, as an ordinary tensor.

        Raises:
            LazyLogitsError: what they are made of was changed or freed since.
        """
        with _MAKING, torch.inference_mode(False), without_transforms():
            if self._made is None:
                self._make()
            elif self.is_behind:
                self._see()
            elif self._made.requires_grad != self._learns and not self.is_edited:
                self._keep(self._made.detach())  # a leaf has been asked for a gradient, or no longer
            self.check_others()
            if self.root._is_bound and self.root.is_edited:
                raise LazyLogitsError(_WATCHED)
        assert self._made is not None
        return self._made

    def _make(self) -> None:
        viewed = self._viewed
        if viewed is not None and (viewed.is_at_hand or self._is_whole):
            made = viewed.made()
            if viewed.may_be_edited:
                self._see()
            else:
                self._keep(self._path(made.detach()))
        elif not self._learns or (self._parent is not None and self._parent.may_be_edited):
            self._keep(self._source.make())
        elif self._parent is None:
            self._keep(self._source.make_with_graph())
        else:  # the gradient goes by way of the parent, which needs its logits
            self._keep(self._path(self._parent.made().detach()))

    def _keep(self, made: Tensor) -> None:
        """Those logits as a child of this tensor's node, whoever looks first, and under whatever mode."""
        if self._learns:
            with torch.enable_grad():
                made = OfLazy.apply(self, made)
        self._made, self._made_version = made, made._version

    def _see(self) -> None:
        """Be a view, as torch has them: what is written to either has its gradient in both."""
        viewed = self._viewed
        assert viewed is not None
        if self._is_watched:
            raise LazyLogitsError(_WATCHED)
        made = viewed.made()
        self._has_joined = True
        if self._learns and not self._has_our_node:
            self._keep(self._path(made.detach()))
            return
        with torch.enable_grad():
            self._made, self._made_version = self._path(made), _BEFORE_THE_EDIT

    def give_away(self) -> None:
        """Somebody has a tensor in the memory of these, and may write to it."""
        root = self.root
        if root._given is not None:
            root._given.append((root.made(), root.made()._version))

    def check_others(self) -> None:
        """Raises LazyLogitsError where another result, of the same memory, has been written to."""
        own = self.root._made
        if any(other is not own and other._version != version for other, version in self.root._given or ()):
            raise LazyLogitsError(_SHARED)

    def join(self) -> None:
        """Be in the memory of what this is a view of, for whoever writes to either, or may."""
        viewed = self._viewed
        if viewed is None or self._has_joined or (not self.root.is_made and self._source.is_spent):
            return  # the others can be read no more
        with _MAKING, torch.inference_mode(False), without_transforms():
            viewed.join()
            if self._is_watched:
                self._keep(self._path(viewed.made().detach()))
                self.root._is_bound = True
            else:
                self._see()

    @property
    def is_behind(self) -> bool:
        """Whether what this is a view of was written to where this has not been since."""
        return self.is_apart and self._viewed.may_be_edited  # type: ignore[union-attr]

    @property
    def root(self) -> InMemory:
        """What these logits are a view of, or themselves."""
        root = self
        while root._viewed is not None:
            root = root._viewed
        return root

    @property
    def place(self) -> int | None:
        """What tells the memory where these logits are, or will be once somebody writes."""
        made = self.root._made
        return id(self.root) if made is None else memory_of(made)

    @property
    def is_at_hand(self) -> bool:
        """Whether these logits are in memory, here or in what they are a view of."""
        return self.is_made or (self._viewed is not None and self._viewed.is_at_hand)

    @property
    def is_apart(self) -> bool:
        """Whether they are a view of others, and may be in other memory."""
        return self._viewed is not None and not self._has_joined

    @property
    def is_alone(self) -> bool:
        """Whether they are in memory, and what they are a view of is not, but may be."""
        return self.is_at_hand and self.is_apart and not (self.root.is_made or self._source.is_spent)

    @property
    def is_edited(self) -> bool:
        """Whether the logits have been written to since they were made."""
        return self._made is not None and self._made._version != self._made_version

    @property
    def may_be_edited(self) -> bool:
        """The same, or what they are of, or somebody has the memory, to write to without a word."""
        of = self._viewed
        return self._is_exposed or self.is_edited or (of is not None and of.may_be_edited)

    @property
    def is_leaf_of_its_own(self) -> bool:
        """Whether gradients are kept by this tensor."""
        with without_torch_function():
            return self.requires_grad and self.is_leaf

    def before_write(self) -> None:
        """Raises LazyLogitsError where not everybody would see what is about to be written."""
        root = self.root
        if root._given is not None:
            raise LazyLogitsError(_SHARED)
        of: InMemory | None = self
        while of is not None:
            if of._is_watched:
                raise LazyLogitsError(_WATCHED)
            of = of._viewed
        root.made()
        self.join()

    @property
    def _is_watched(self) -> bool:
        with without_torch_function():
            return bool(self._backward_hooks) or self.retains_grad

    @property
    def _learns(self) -> bool:
        """Whether this tensor, as it was before any edit, requires a gradient."""
        with without_torch_function():
            return self.requires_grad

    @property
    def _has_our_node(self) -> bool:
        with without_torch_function():
            return getattr(self.grad_fn, "is_lazy", False)
