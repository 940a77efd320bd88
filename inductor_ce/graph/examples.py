"""Example values of new nodes: of equal calls torch makes the first, and the others are like it."""

from __future__ import annotations

import types
from collections.abc import Hashable
from typing import Any, ClassVar

import torch

from ..common.compat.graphs import (
    FakeTensorMode,
    Layout,
    OpOverload,
    auto_functionalized,
    enable_python_dispatcher,
    is_plain_tensor,
    tree_leaves,
    tree_map,
)

_CONSTANTS = (str, int, float, torch.dtype, torch.device, torch.layout, torch.memory_format, OpOverload)

_UNKNOWN = object()


class Examples:
    """Results of calls on examples.

    NOTE Equal calls. The pieces of a head are alike, as are the graphs of a program, and a call on fake
    tensors takes the better part of a millisecond. Where the arguments' sizes, strides, dtypes and constants
    are those of an earlier call, so are the results', and where each of these had memory of its own they need
    no call. What is a view of another tensor is always made of it. What functions of torch and of ours give
    is known to all graphs; what those of others give, who may change them, to one.

    Args:
        mode: in which the examples are made.
    """

    _of_all: ClassVar[dict[Hashable, Any]] = {}
    _MOST = 4096  # calls that are remembered for all graphs, some kilobytes each at most

    def __init__(self, mode: FakeTensorMode):
        self._mode = mode
        self._of_one: dict[Hashable, Any] = {}
        self._state = _state()

    def of(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a function, or of the Tensor method whose name is given."""
        key = _key(target, args, kwargs, self._state)
        known = self._of_all if _is_of_all(target, args, kwargs) else self._of_one
        layouts = known.get(key, _UNKNOWN)
        if layouts is not _UNKNOWN:
            return tree_map(self._again, layouts)
        result = self._called(target, args, kwargs)
        if key is not None and _has_own_memory(result, (args, kwargs)):
            if len(known) >= self._MOST:
                known.clear()
            known[key] = tree_map(_layout, result)
        return result

    def _again(self, layout: Layout | None) -> Any:
        return layout if layout is None else layout.example(self._mode)

    def _called(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, str):
            target, args = getattr(args[0], target), args[1:]
        with self._mode, enable_python_dispatcher(), torch.no_grad():
            return target(*args, **kwargs)


def _key(*call: Any) -> Hashable:
    """Equal for calls whose results are alike. None where a size is symbolic, or a value of another kind."""
    try:
        key = _described(call)
        hash(key)
    except TypeError:
        return None
    return key


def _described(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((name, _described(item)) for name, item in value.items())
    if isinstance(value, torch.Tensor) and is_plain_tensor(value):
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.device
    if value is None or isinstance(value, _CONSTANTS) or callable(value):
        return type(value), value
    raise TypeError(f"{type(value).__name__} is neither a tensor nor a constant")


def _has_own_memory(result: Any, given: Any) -> bool:
    """Whether a result is tensors of known sizes, none of which is a view of another or of what was given."""
    tensors = [leaf for leaf in tree_leaves(result) if leaf is not None]
    if not all(isinstance(t, torch.Tensor) and is_plain_tensor(t) for t in tensors):
        return False
    if not all(isinstance(size, int) for t in tensors for size in (*t.shape, t.storage_offset())):
        return False
    others = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    places = {t.untyped_storage()._cdata for t in tensors}
    return len(places) == len(tensors) and places.isdisjoint(t.untyped_storage()._cdata for t in others)


def _layout(example: Any) -> Layout | None:
    return example if example is None else Layout.of(example)


def _state() -> Hashable:
    """What else the result of a call depends on."""
    on = torch.is_autocast_enabled
    autocast = tuple(on(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda"))
    return torch.get_default_dtype(), torch.get_default_device(), autocast


def _is_of_all(*call: Any) -> bool:
    """Whether all functions of a call are torch's or ours."""
    return all(map(_is_ours_or_torchs, filter(callable, tree_leaves(call))))


def _is_ours_or_torchs(function: Any) -> bool:
    if isinstance(function, OpOverload):
        return function.namespace in ("aten", "prims", "inductor_ce")
    if isinstance(function, types.FunctionType):
        return function.__module__.startswith("torch.")
    return function is auto_functionalized or isinstance(function, types.BuiltinFunctionType)
