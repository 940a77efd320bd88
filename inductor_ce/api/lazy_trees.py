"""Lazy logits among what a function is given: found, or made, wherever they are in a tree."""

from __future__ import annotations

from typing import Any

import torch

from ..common.compat.graphs import local_of, tree_leaves, tree_map, without_torch_function


def is_lazy(x: Any) -> bool:
    return getattr(type(x), "is_lazy_logits", False)


def lazy_in(tree: Any) -> list[Any]:
    return [leaf for leaf in tree_leaves(list(tree)) if is_lazy(leaf)]


def made(tree: Any) -> Any:
    """With the logits themselves in place of lazy ones."""
    return tree_map(lambda x: x.made() if is_lazy(x) else x, tree)


def current(tree: Any) -> Any:
    """The same for those that have been written to; a leaf stays the leaf."""
    return tree_map(
        lambda x: x.made() if is_lazy(x) and (x.is_edited or x.is_behind) and not x.is_leaf_of_its_own else x,
        tree,
    )


def values(tree: Any) -> Any:
    """The same for all, without their gradients."""
    return tree_map(lambda x: x.made().detach() if is_lazy(x) else x, tree)


def memory_of(x: torch.Tensor) -> int | None:
    """Where a tensor is, or this rank's part of it; None where it has no one place."""
    try:
        return local_of(x).untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def memory(tree: Any) -> set[int]:
    """Where the tensors of a tree are."""
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not is_lazy(leaf))
    return {place for place in map(memory_of, tensors) if place is not None}


def differentiated(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.autograd.grad, where lazy logits are among what is differentiated or by what."""
    for watched in lazy_in([current(inputs)]):
        watched.refuse_to_be_watched()
    with without_torch_function():
        return torch.autograd.grad(made(outputs), current(inputs), *made(args), **made(kwargs))
