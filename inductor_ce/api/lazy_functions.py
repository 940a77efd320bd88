"""What is done to lazy logits without making all of them: questions, other forms, rows, a few reductions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.compat.graphs import is_capturing
from .lazy_source import Source

CHUNK_BYTES = 2**26  # of the logits that are there at once where only a few numbers of each row are wanted

aten = torch.ops.aten

COPIES = {aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh.default}

# What autograd's node of the tensor itself is asked for.
WATCHES = {Tensor.register_hook, Tensor.retain_grad}
DIFFERENTIATE = {torch.autograd.grad, torch.autograd.backward}


# Questions

_QUESTIONS = {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride),
    *(Tensor.storage_offset, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous),
    *(Tensor.element_size, Tensor.get_device, Tensor.__len__, Tensor.is_inference, Tensor.is_signed),
    *(Tensor.requires_grad_, Tensor.__hash__, Tensor.__repr__, Tensor.is_same_size),
    *(Tensor._is_view, Tensor.is_neg, Tensor.is_conj, Tensor.is_coalesced, torch.is_conj, torch.is_neg),
    *(torch.numel, torch.is_floating_point, torch.is_complex, torch.is_inference, torch.is_signed),
    *(torch.result_type, torch.is_same_size),
}
# Properties that are not about the tensor but of its elements.
_VALUES = ("T", "mT", "H", "mH", "data", "real", "imag", "__cuda_array_interface__")


def is_question(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether shape, dtype and the like are the answer."""
    if func in _QUESTIONS or (func is Tensor.type and len(args) == 1):
        return True
    if func is Tensor.untyped_storage:
        return is_capturing()
    name = getattr(func, "__name__", "")
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    return name in ("__get__", "__set__", "__delete__") and owner not in _VALUES


# Writes


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that a torch callable writes to."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    operator = (
        name.startswith("__i") and name.endswith("__") and name not in ("__index__", "__int__", "__iter__")
    )
    if in_place or operator or name in ("__setitem__", "__set__", "set_") or kwargs.get("inplace"):
        yield from args[:1]
    yield kwargs.get("out")


def written_by_schema(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The same for an operator."""
    for parameter, given in itertools.zip_longest(func._schema.arguments, args):
        if parameter is not None and parameter.alias_info is not None and parameter.alias_info.is_write:
            yield given if given is not None else kwargs.get(parameter.name)


# Functions


def lazily(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a torch callable, without all logits; NotImplemented where it needs them, or has them."""
    handler = _HANDLERS.get(func)
    if func is Tensor.data.__get__:  # type: ignore[attr-defined]
        handler = _detach
    z = args[0] if args else None
    if handler is None or not getattr(z, "is_lazy_logits", False) or z.is_made:  # type: ignore[union-attr]
        return NotImplemented
    return handler(z, *args[1:], **kwargs)


def _wants_gradient(z: Any) -> bool:
    return torch.is_grad_enabled() and z.requires_grad


def _cast(dtype: torch.dtype) -> Callable[..., Any]:
    def handler(z: Any, **kwargs: Any) -> Any:
        return NotImplemented if kwargs else _as_dtype(z, dtype)

    return handler


def _as_dtype(z: Any, dtype: torch.dtype) -> Any:
    if dtype == z.dtype:
        return z
    if not dtype.is_floating_point:
        return NotImplemented
    return z.form(z._source.then("to", dtype, dtype=dtype))


def _to(z: Any, *args: Any, **kwargs: Any) -> Any:
    """x.to(dtype), x.to(device, dtype), x.to(other), on the same device."""
    given = [*args, *(kwargs.pop(name) for name in ("device", "dtype", "other") if name in kwargs)]
    if any(kwargs.get(name) for name in kwargs if name != "non_blocking") or any(a is True for a in given):
        return NotImplemented
    dtype = z.dtype
    for value in given:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, Tensor):
            dtype = value.dtype
        if isinstance(value, (str, int, torch.device, Tensor)) and not isinstance(value, bool):
            device = value.device if isinstance(value, Tensor) else torch.device(value)
            if device.type != z.device.type or device.index not in (None, z.device.index):
                return NotImplemented
    return _as_dtype(z, dtype)


def _type(z: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    return (
        _as_dtype(z, dtype) if isinstance(dtype, torch.dtype) and not args and not kwargs else NotImplemented
    )


def _type_as(z: Any, other: Tensor) -> Any:
    return _as_dtype(z, other.dtype) if other.device == z.device else NotImplemented


def _itself(z: Any, **kwargs: Any) -> Any:
    """contiguous: they will be."""
    return (
        z
        if kwargs.get("memory_format", torch.contiguous_format) is torch.contiguous_format
        else NotImplemented
    )


def _clone(z: Any, **kwargs: Any) -> Any:
    z._source.check()
    return z.form(Source(z._source.recipe, z._source.parts))


def _detach(z: Any, *args: Any) -> Any:
    with torch.no_grad():
        return z.form(z._source, path=Tensor.detach)


def _reshaped(func: Any) -> Callable[..., Any]:
    """Views that leave the classes last and the rows in their order."""

    def handler(z: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, torch.dtype) for a in args):
            return NotImplemented  # the same bits as something else
        shape = func(torch.empty(z.shape, device="meta"), *args, **kwargs).shape
        if not shape or shape[-1] != z.shape[-1] or shape[:-1].numel() != z.shape[:-1].numel():
            return NotImplemented
        source = z._source
        hidden = source.parts[0]
        view = source.of(hidden.reshape(*shape[:-1], hidden.shape[-1]))
        return z.form(view, path=lambda made: func(made, *args, **kwargs))

    return handler


def _getitem(z: Any, index: Any) -> Any:
    over_rows = _over_rows(index, z.dim())
    if over_rows is None or (_wants_gradient(z) and not z.is_ours):
        return NotImplemented
    basic = all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in over_rows)
    path = (lambda made: made[index]) if basic else None
    return z.rows(z._source.parts[0][over_rows], path)


def _over_rows(index: Any, rank: int) -> tuple[Any, ...] | None:
    """The index of all dimensions but the last, where x[index] leaves that whole; else None."""
    items = list(index) if isinstance(index, tuple) else [index]
    items = [torch.as_tensor(i) if isinstance(i, (list, range)) else i for i in items]
    if any(isinstance(i, bool) for i in items):
        return None
    taken = sum(map(_dimensions, items))
    missing = [slice(None)] * (rank - taken)
    if Ellipsis in [i for i in items if not isinstance(i, Tensor)]:
        place = next(k for k, i in enumerate(items) if i is Ellipsis)
        items[place : place + 1] = missing
    else:
        items += missing
    if not items or not isinstance(items[-1], slice) or items[-1] != slice(None):
        return None
    return tuple(items[:-1])


def _dimensions(item: Any) -> int:
    """How many dimensions of a tensor an item of an index is for."""
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _along(z: Any, dim: int, item: Any) -> Any:
    """z[:, ..., item] with the item at a dimension."""
    return _getitem(z, (slice(None),) * (dim % z.dim()) + (item,))


def _select(z: Any, dim: int, index: int) -> Any:
    return _along(z, dim, index)


def _narrow(z: Any, dim: int, start: Any, length: int) -> Any:
    if not isinstance(start, int):
        return NotImplemented
    start = start % z.shape[dim] if start < 0 else start
    return _along(z, dim, slice(start, start + length))


def _index_select(z: Any, dim: int, index: Tensor) -> Any:
    return _along(z, dim, index)


def _cut(z: Any, dim: int, lengths: list[int]) -> Any:
    if dim % z.dim() == z.dim() - 1:
        return NotImplemented
    starts = itertools.accumulate(lengths, initial=0)
    pieces = [_along(z, dim, slice(s, s + n)) for s, n in zip(starts, lengths, strict=False)]
    return NotImplemented if any(piece is NotImplemented for piece in pieces) else tuple(pieces)


def _split(z: Any, split_size: Any, dim: int = 0) -> Any:
    if not isinstance(split_size, int):
        return _cut(z, dim, list(split_size))
    size = z.shape[dim]
    return _cut(z, dim, [min(split_size, size - s) for s in range(0, size, max(split_size, 1))])


def _chunk(z: Any, chunks: int, dim: int = 0) -> Any:
    return _split(z, max(-(-z.shape[dim] // chunks), 1), dim)


def _unbind(z: Any, dim: int = 0) -> Any:
    if dim % z.dim() == z.dim() - 1:
        return NotImplemented
    pieces = [_along(z, dim, i) for i in range(z.shape[dim])]
    return NotImplemented if any(piece is NotImplemented for piece in pieces) else tuple(pieces)


def _iter(z: Any) -> Any:
    pieces = _unbind(z)
    return pieces if pieces is NotImplemented else iter(pieces)


# Reductions over the classes, chunk by chunk


def _reduced(func: Any, differentiable: bool = True) -> Callable[..., Any]:
    """func(z, dim=-1, ...), of which a gradient is not wanted."""

    def handler(z: Any, *args: Any, **kwargs: Any) -> Any:
        dim = args[0] if args else kwargs.get("dim")
        return _of_rows(func, z, dim, args, kwargs, differentiable)

    return handler


def _of_rows(func: Any, z: Any, dim: Any, args: Any, kwargs: Any, differentiable: bool) -> Any:
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if not isinstance(dim, int) or dim % z.dim() != z.dim() - 1 or "out" in kwargs:
        return NotImplemented
    if differentiable and _wants_gradient(z):
        return NotImplemented
    return _by_chunks(z, lambda rows, _: func(rows, *_last(args, dim), **_last_named(kwargs)))


def _last(args: tuple[Any, ...], dim: int) -> tuple[Any, ...]:
    """Positional arguments with the dimension as the last one of rows."""
    return tuple(
        -1 if a is not True and a is not False and a == dim and i == 0 else a for i, a in enumerate(args)
    )


def _last_named(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: -1 if name == "dim" else value for name, value in kwargs.items()}


def _by_chunks(z: Any, function: Callable[[Tensor, slice], Any]) -> Any:
    """function(some rows of logits [n, V], which), for all rows, put together in the shape of z's rows."""
    source = z._source
    source.check()
    hidden, *others = source.parts
    lead = hidden.shape[:-1]
    rows = hidden.reshape(-1, hidden.shape[-1])
    step = max(CHUNK_BYTES // (z.shape[-1] * 4), 1)
    with torch.no_grad():
        found = [
            function(source.recipe.make([rows[start : start + step], *others]), slice(start, start + step))
            for start in range(0, max(len(rows), 1), step)
        ]
    if isinstance(found[0], Tensor):
        return torch.cat(found).reshape(*lead, *found[0].shape[1:])
    columns = [torch.cat(c).reshape(*lead, *c[0].shape[1:]) for c in zip(*found, strict=True)]
    return type(found[0])(columns)


def _topk(z: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if dim % z.dim() != z.dim() - 1 or _wants_gradient(z):
        return NotImplemented
    return _by_chunks(z, lambda rows, _: torch.topk(rows, k, -1, largest, sorted))


def _gather(z: Any, dim: int, index: Tensor, **kwargs: Any) -> Any:
    whole = index.dim() == z.dim() and index.shape[:-1] == z.shape[:-1]
    if dim % z.dim() != z.dim() - 1 or not whole or kwargs or _wants_gradient(z):
        return NotImplemented
    flat = index.reshape(-1, index.shape[-1])
    return _by_chunks(z, lambda rows, which: rows.gather(-1, flat[which]))


def _normalised(func: Any) -> Callable[..., Any]:
    """softmax and log_softmax, as one more step of each row, of which a gradient is not wanted."""

    def handler(z: Any, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("_stacklevel", None)
        dtype = (
            kwargs.pop("dtype", None)
            or next((a for a in args if isinstance(a, torch.dtype)), None)
            or z.dtype
        )
        if not isinstance(dim, int) or dim % z.dim() != z.dim() - 1 or kwargs or _wants_gradient(z):
            return NotImplemented
        return z.form(z._source.then(func, -1, dtype, dtype=dtype))

    return handler


def _like(func: Any) -> Callable[..., Any]:
    """zeros_like and the like: nothing is read."""
    return lambda z, *args, **kwargs: func(
        torch.empty((), dtype=z.dtype, device=z.device).expand(z.shape), *args, **kwargs
    )


def _methods(*names: str) -> list[Any]:
    """Functions and methods of these names."""
    found = [getattr(home, name, None) for name in names for home in (torch, Tensor)]
    return [each for each in found if each is not None]


_HANDLERS: dict[Any, Callable[..., Any]] = {
    Tensor.float: _cast(torch.float32),
    Tensor.half: _cast(torch.float16),
    Tensor.bfloat16: _cast(torch.bfloat16),
    Tensor.double: _cast(torch.float64),
    Tensor.to: _to,
    Tensor.type: _type,
    Tensor.type_as: _type_as,
    Tensor.contiguous: _itself,
    **dict.fromkeys(_methods("clone"), _clone),
    **dict.fromkeys(_methods("detach"), _detach),
    **{
        func: _reshaped(func)
        for func in _methods(
            "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"
        )
    },
    Tensor.__getitem__: _getitem,
    **dict.fromkeys(_methods("select"), _select),
    **dict.fromkeys(_methods("narrow"), _narrow),
    **dict.fromkeys(_methods("index_select"), _index_select),
    **dict.fromkeys(_methods("split"), _split),
    **dict.fromkeys(_methods("chunk"), _chunk),
    **dict.fromkeys(_methods("unbind"), _unbind),
    Tensor.__iter__: _iter,
    **{func: _reduced(func, differentiable=False) for func in _methods("argmax", "argmin")},
    **{func: _reduced(func) for func in _methods("max", "amax", "logsumexp")},
    **dict.fromkeys(_methods("topk"), _topk),
    **dict.fromkeys(_methods("gather"), _gather),
    **{func: _normalised(torch.log_softmax) for func in (*_methods("log_softmax"), F.log_softmax)},
    **{func: _normalised(torch.softmax) for func in (*_methods("softmax"), F.softmax)},
    **{
        func: _like(func)
        for func in _methods("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
    },
    **{
        func: _like(func) for func in _methods("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")
    },
}
