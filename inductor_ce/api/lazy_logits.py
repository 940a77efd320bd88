"""Logits that are made when somebody looks.

A compiled function whose loss needs no logits returns, in their place, what they are made of: hidden states,
the weight, and the steps between (`rewriting.recipes`). `LazyLogits` holds these behind a tensor of the right
shape, dtype and device. Questions about it are answered, casts, views and slices of rows stay lazy, some
reductions go by chunks of rows, and everything else makes the logits, once, and is done to them. In which
memory they are, `lazy_memory` tells.

NOTE Gradients. A lazy tensor has a node of its own in autograd's graph, whose backward turns a gradient of
the logits into those of the parts. What is made of it later is a child of that node. So whatever is done to
it, by Python or by C++ that knows nothing of it, no gradient is lost: an autograd.Function, hooks,
`retain_grad`, `torch.autograd.grad(loss, logits)`. A slice of rows goes round that node, straight to its rows
of the hidden states, or its gradient would have the size of all logits.

NOTE Never a wrong number. The parts are the user's own tensors. When logits are made the version of each must
be what it was; after an optimizer's step it is not, and an error says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.compat.distributed import waits_for_backward
from ..common.compat.graphs import (
    is_compiling,
    keep_dynamic,
    refuse_memory,
    without_torch_function,
)
from ..common.errors import LazyLogitsError
from ..rewriting.recipes import Recipe
from . import lazy_functions, lazy_questions
from . import lazy_trees as trees
from .lazy_memory import Given, InMemory
from .lazy_nodes import OfParent, OfParts
from .lazy_source import Source

Strides = tuple[int, ...]


class LazyLogits(InMemory):
    """Logits [..., V] that a compiled function returned beside its loss, made when somebody looks.

    An ordinary tensor to whoever uses it; `is_made` tells whether all logits are in memory.
    """

    is_lazy_logits = True

    _is_sliced: bool  # whether gradients of rows go round its node

    @staticmethod
    def __new__(cls, source: Source, strides: Strides | None = None) -> LazyLogits:
        made = Tensor._make_wrapper_subclass(
            cls,
            source.shape,
            strides=strides,
            dtype=source.recipe.dtype,
            device=source.parts[0].device,
        )
        refuse_memory(made)
        made._source, made._parent, made._viewed = source, None, None
        made._made, made._made_version = None, 0
        made._is_whole = made._is_sliced = made._is_exposed = made._is_bound = made._has_joined = False
        made._given = None
        keep_dynamic(source.parts[0], made, dims=len(source.shape) - 1)
        return made

    @staticmethod
    def returned(source: Source, given: Given | None = None, strides: Strides | None = None) -> LazyLogits:
        """Logits in the place of those that a compiled function would have returned.

        Those that would have been in the same memory have one list of what is `given` away of it; `strides`
        are those that they would have, if not contiguous.
        """
        if torch.is_grad_enabled() and source.recipe.requires_grad:
            made = OfParts.apply(LazyLogits, source, strides, *source.parts)
        else:
            made = LazyLogits(source, strides)
        made._given = given
        return made

    @property
    def source(self) -> Source:
        return self._source

    @property
    def is_ours(self) -> bool:
        """Whether the parts stand for this tensor: it is what they make, its gradients are theirs."""
        if self._source.is_example:
            return True
        if self.may_be_edited or self._is_watched:
            return False
        if not self._learns:
            return True
        if not self._has_our_node:
            return False
        return self._parent is None or self._parent.is_ours

    # Other forms

    def form(self, source: Source, path: Callable[[Tensor], Tensor], is_view: bool = False) -> LazyLogits:
        """All of these logits otherwise: what `path` makes of them, a cast, a copy or a view."""
        strides = self._strides(path) if is_view else None
        if torch.is_grad_enabled() and self._learns:
            made = OfParent.apply(self, source, strides)
            made._parent = self
        else:
            made = LazyLogits(source, strides)
        made._is_whole = True
        return self._followed(made, path, is_view)

    def again(self, is_view: bool) -> LazyLogits:
        """The same logits below autograd: a copy, or a view."""
        made = LazyLogits(self._source, self._strides(torch.Tensor.detach) if is_view else None)
        made._is_whole = True
        return self._followed(made, torch.Tensor.detach, is_view)

    def part(self, source: Source, path: Callable[[Tensor], Tensor], is_view: bool) -> LazyLogits:
        """Some rows of these logits, or some classes: what `path` makes of them, a copy or a view."""
        strides = self._strides(path) if is_view else None
        if torch.is_grad_enabled() and self._learns:
            made = LazyLogits.returned(source, strides=strides)
            self.go_round()
        else:
            made = LazyLogits(source.detached(), strides)
        return self._followed(made, path, is_view)

    def go_round(self) -> None:
        """Let it be known that a gradient does not go by way of this tensor's node."""
        form: LazyLogits | None = self
        while form is not None:
            form._is_sliced, form = True, form._parent

    def _strides(self, path: Callable[[Tensor], Tensor]) -> Strides:
        """Those of the view of these that `path` takes."""
        return path(lazy_functions.shaped(self)).stride()

    def _followed(self, made: LazyLogits, path: Callable[[Tensor], Tensor], is_view: bool) -> LazyLogits:
        made._path = path if torch.is_grad_enabled() else lambda viewed: path(viewed).detach()
        made._viewed = self if is_view else None
        return made

    def detached_in_place(self) -> LazyLogits:
        """This tensor, a leaf from now on; what has been made of it keeps its gradient.

        Raises:
            RuntimeError: it is a view, as of any tensor.
        """
        if self.requires_grad and self._viewed is not None:
            raise RuntimeError("Can't detach views in-place. Use detach() instead.")
        with without_torch_function():
            Tensor.detach_(self)
        made = self._made
        if made is not None:
            self._made = made.requires_grad_(False) if made.is_leaf else made.detach()
        self._parent, self._is_sliced = None, False
        return self

    def refuse_to_be_watched(self) -> None:
        """Raises LazyLogitsError where a gradient goes round the node of this tensor."""
        if self._is_sliced:
            raise LazyLogitsError(
                "Rows have been taken of logits that were returned lazily, or a compiled function has taken "
                "them apart, and the gradient does not go by way of these logits: set hooks, and retain the "
                'gradient, before that, or use the option returned_logits="eager".'
            )

    # As an input of compiled functions

    def __tensor_flatten__(self) -> tuple[list[str], Recipe | None]:
        if not self.is_ours:
            return ["_whole"], None
        if not self.requires_grad and any(part.requires_grad for part in self._source.parts):
            self._source = self._source.detached()  # once: Dynamo knows tensors by their identity
        self.check_others()
        if not is_compiling():  # which would tell an error of its own; what is compiled checks
            self._source.check()
        parts = self._source.parts
        names = [f"_part{i}" for i in range(len(parts))]
        for name, part in zip(names, parts, strict=True):
            setattr(self, name, part)
        return names, self._source.recipe

    @property
    def _whole(self) -> Tensor:
        """The one part where the parts do not stand for this tensor, made when it is asked for by name.

        Guards ask for no more than the names.
        """
        return self.made()

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], recipe: Recipe | None, size: Any, stride: Any
    ) -> Tensor:
        if recipe is None:
            return parts["_whole"].detach()
        return LazyLogits(Source(recipe, list(parts.values())), tuple(stride))

    # What is done to them

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if lazy_questions.is_question(func):
            asked = args if func in lazy_questions.OF_ITSELF else trees.current(args)
            with without_torch_function():
                return func(*asked, **kwargs)
        if func in lazy_questions.WATCHES:
            (watched,) = trees.current(args[:1])
            if isinstance(watched, LazyLogits):
                if args[1:] and waits_for_backward(args[1]) and watched.source.parts[0].requires_grad:
                    return watched.source.parts[0].register_hook(args[1])
                watched.refuse_to_be_watched()
            with without_torch_function():
                return func(watched, *args[1:], **kwargs)
        if func in (Tensor.detach_, torch.detach_):
            return args[0].detached_in_place()
        if func is torch.autograd.grad:
            return trees.differentiated(*args, **kwargs)
        for z in trees.lazy_in(args):
            z.check_others()
        result = lazy_functions.lazily(func, args, kwargs)
        if result is not NotImplemented:
            return result
        for written in trees.lazy_in(lazy_questions.written_by(func, args, kwargs)):
            written.before_write()
        if func in lazy_questions.EXPOSE:
            args[0].join()
            args[0].root._is_exposed = True
        return _called(func, args, kwargs, trees.made)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What C++ does to them, below autograd, where the node of this tensor sees to the gradient."""
        kwargs = kwargs or {}
        if func in lazy_questions.COPIES and not args[0].may_be_edited:
            return args[0].again(is_view=func is not torch.ops.aten.clone.default)
        for written in trees.lazy_in(lazy_questions.written_by_schema(func, args, kwargs)):
            written.before_write()
        return _called(func, args, kwargs, trees.values)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self.is_made:
            return repr(self._made)
        return f"LazyLogits(size={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, not made)"


def _called(func: Any, args: Any, kwargs: Any, made: Callable[[Any], Any]) -> Any:
    """The result of a callable of the logits themselves; if in their memory, in that of what they are of."""
    result = func(*made(args), **made(kwargs))
    given = [z for z in trees.lazy_in([args, kwargs]) if z.is_apart or z.root._given is not None]
    if given and not trees.memory(result).isdisjoint(trees.memory([z.made() for z in given])):
        for z in given:
            z.join()
            z.give_away()
        result = func(*made(args), **made(kwargs))
    return result
