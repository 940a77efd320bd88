"""What callables of torch do with a tensor: ask of it, watch, copy, write to it, give its memory away."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..common.compat.graphs import is_capturing

aten = torch.ops.aten

COPIES = {aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh.default}

# What autograd's node of the tensor itself is asked for.
WATCHES = {Tensor.register_hook, Tensor.retain_grad}

# What gives the memory away, to be written to without a word.
EXPOSE = {
    *(Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr, Tensor.untyped_storage),
    *(Tensor.storage, Tensor.data.__get__, Tensor.data.__set__),  # type: ignore[attr-defined]
}


# Questions

_QUESTIONS = {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride),
    *(Tensor.storage_offset, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous),
    *(Tensor.element_size, Tensor.get_device, Tensor.__len__, Tensor.is_inference, Tensor.is_signed),
    *(Tensor.requires_grad_, Tensor.__hash__, Tensor.__repr__, Tensor.__format__),
    *(Tensor._is_view, Tensor.is_neg, Tensor.is_conj, Tensor.is_coalesced, torch.is_conj, torch.is_neg),
    *(torch.numel, torch.is_floating_point, torch.is_complex, torch.is_inference, torch.is_signed),
    torch.result_type,
}
# Those of which Dynamo asks the rest by C++, which goes to this tensor.
OF_ITSELF = {Tensor._is_view, Tensor.storage_offset}
# Properties that are not about the tensor but of its elements.
_VALUES = ("T", "mT", "H", "mH", "data", "real", "imag", "__cuda_array_interface__")


def is_question(func: Any) -> bool:
    """Whether shape, dtype and the like are the answer."""
    if func in _QUESTIONS:
        return True
    if func is Tensor.untyped_storage:
        return is_capturing()
    owner = getattr(func, "__self__", None)
    of = getattr(getattr(owner, "fget", owner), "__name__", "")
    return getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__") and of not in _VALUES


# Writes


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that a torch callable writes to."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    others = ("__index__", "__int__", "__iter__")
    operator = name.startswith("__i") and name.endswith("__") and name not in others
    if in_place or operator or name in ("__setitem__", "__set__", "set_") or kwargs.get("inplace"):
        yield from args[:1]
    yield kwargs.get("out")


def written_by_schema(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The same for an operator."""
    for parameter, given in itertools.zip_longest(func._schema.arguments, args):
        if parameter is not None and parameter.alias_info is not None and parameter.alias_info.is_write:
            yield given if given is not None else kwargs.get(parameter.name)
