"""What is done to lazy logits without making all of them: other forms, rows, a few reductions."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reading.row_views import range_of
from .lazy_trees import memory_of

CHUNK_BYTES = 2**26  # of the logits that are there at once where only a few numbers of each row are wanted

# Functions


def lazily(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a torch callable, without all logits; NotImplemented where it needs them, or has them."""
    handler = _HANDLERS.get(func)
    z = args[0] if args else None
    if handler is None or not getattr(z, "is_lazy_logits", False):
        return NotImplemented
    if z.is_at_hand and not (func in _CASTS or (func in _VIEWS and z.is_alone)):  # type: ignore[union-attr]
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
    if not dtype.is_floating_point or z.is_at_hand:
        return NotImplemented
    return z.form(z._source.then("to", dtype, dtype=dtype), lambda made: made.to(dtype))


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
    if dtype is None:
        return torch.empty(0, dtype=z.dtype, device=z.device).type()
    named = not isinstance(dtype, torch.dtype) or args or kwargs
    return NotImplemented if named else _as_dtype(z, dtype)


def _type_as(z: Any, other: Tensor) -> Any:
    return _as_dtype(z, other.dtype) if other.device == z.device else NotImplemented


def _itself(z: Any, **kwargs: Any) -> Any:
    """contiguous: they will be, but in memory of their own where rows were cut."""
    if kwargs.get("memory_format", torch.contiguous_format) is not torch.contiguous_format:
        return NotImplemented
    return z if shaped(z).is_contiguous() else _copy(z)


def _clone(z: Any, **kwargs: Any) -> Any:
    if kwargs.get("memory_format", torch.preserve_format) in (torch.contiguous_format, torch.preserve_format):
        return _copy(z)
    return NotImplemented


def _copy(z: Any) -> Any:
    return z.form(z._source.again(), torch.clone)


def _device(z: Any, *args: Any, **kwargs: Any) -> Any:
    """x.cpu(), which is x where it is there."""
    return NotImplemented if args or kwargs or z.device.type != "cpu" else z


def _detach(z: Any, *args: Any) -> Any:
    with torch.no_grad():
        return z.form(z._source, Tensor.detach, is_view=True)


def _reshaped(func: Any) -> Callable[..., Any]:
    """Views, or copies of rows that were cut, that leave the classes last and the rows in their order."""

    def handler(z: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, torch.dtype) for a in args):
            return NotImplemented  # the same bits as something else
        args = tuple(shaped(a) if isinstance(a, Tensor) else a for a in args)  # it may be z itself
        of = shaped(z)
        made = func(of, *args, **kwargs)
        shape = made.shape
        if not shape or shape[-1] != z.shape[-1] or math.prod(shape[:-1]) != math.prod(z.shape[:-1]):
            return NotImplemented
        source = z._source
        hidden = source.parts[0]
        source = source.of(hidden.reshape(*shape[:-1], hidden.shape[-1]))
        if memory_of(made) == memory_of(of):
            return z.form(source, lambda made: func(made, *args, **kwargs), is_view=True)
        return z.form(source, lambda made: func(made, *args, **kwargs).clone())

    return handler


def _getitem(z: Any, index: Any) -> Any:
    items = _items(index)
    over_rows, over_classes = _split(items, z.dim())
    if over_rows is None or (_wants_gradient(z) and not z.is_ours):
        return NotImplemented
    source, whole = z._source, all(isinstance(i, slice) and i == slice(None) for i in over_rows)
    if over_classes != slice(None):
        classes = range_of(over_classes, z.shape[-1]) if whole else None
        if classes is None or classes[0] >= classes[1]:
            return NotImplemented
        cut = source.then(operator.getitem, (..., slice(*classes)), classes=classes[1] - classes[0])
        return z.part(cut, lambda made: made[tuple(items)], is_view=True)
    is_view = not any(isinstance(i, Tensor) for i in items)
    if whole:
        return z.form(source, lambda made: made[tuple(items)], is_view=True)
    return z.part(source.of(source.parts[0][over_rows]), lambda made: made[tuple(items)], is_view)


def _items(index: Any) -> list[Any]:
    """What the dimensions are indexed by; as numbers and tensors where it stands for them."""
    items = list(index) if isinstance(index, tuple) else [index]
    items = [i if i is None or isinstance(i, _BASIC) else _as_index(i) for i in items]
    return [int(i) if isinstance(i, Tensor) and i.dim() == 0 and not _is_mask(i) else i for i in items]


_BASIC = (bool, int, slice, type(Ellipsis), Tensor)


def _as_index(item: Any) -> Tensor:
    found = torch.as_tensor(item)
    return found if found.numel() else found.long()


def _split(items: list[Any], rank: int) -> tuple[tuple[Any, ...] | None, Any]:
    """The index of all dimensions but the last, where a slice is left of that; else None. And the slice."""
    if any(isinstance(i, bool) for i in items):
        return None, None
    missing = [slice(None)] * (rank - sum(map(_dimensions, items)))
    place = next((k for k, i in enumerate(items) if i is Ellipsis), len(items))
    whole = [*items[:place], *missing, *items[place + 1 :]]
    last = whole.pop() if whole else None
    return (tuple(whole), last) if isinstance(last, slice) else (None, None)


def _dimensions(item: Any) -> int:
    """How many dimensions of a tensor an item of an index is for."""
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if isinstance(item, Tensor) and _is_mask(item) else 1


def _is_mask(item: Tensor) -> bool:
    return item.dtype in (torch.bool, torch.uint8)


def _along(z: Any, dim: int, item: Any) -> Any:
    """z[:, ..., item] with the item at a dimension."""
    if not -z.dim() <= dim < z.dim():
        return NotImplemented
    return _getitem(z, (slice(None),) * (dim % z.dim()) + (item,))


def _select(z: Any, dim: int, index: int) -> Any:
    return _along(z, dim, index)


def _index_select(z: Any, dim: int, index: Tensor) -> Any:
    return _along(z, dim, index) if index.dim() == 1 and not _is_mask(index) else NotImplemented


def _narrow(z: Any, dim: int, start: Any, length: int) -> Any:
    if not isinstance(start, int):
        return NotImplemented
    shaped(z).narrow(dim, start, length)  # raises what it raises
    start = start % z.shape[dim] if start < 0 else start
    return _along(z, dim, slice(start, start + length))


def _cut(func: Any) -> Callable[..., Any]:
    """split and chunk, as they cut a tensor of this shape."""

    def handler(z: Any, *args: Any, **kwargs: Any) -> Any:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        lengths = [piece.shape[dim] for piece in func(shaped(z), *args, **kwargs)]
        starts = itertools.accumulate(lengths, initial=0)
        return _pieces(_along(z, dim, slice(s, s + n)) for s, n in zip(starts, lengths, strict=False))

    return handler


def _unbind(z: Any, dim: int = 0) -> Any:
    return _pieces(_along(z, dim, i) for i in range(len(shaped(z).unbind(dim))))


def _pieces(made: Iterable[Any]) -> Any:
    pieces = tuple(made)
    return NotImplemented if any(piece is NotImplemented for piece in pieces) else pieces


def shaped(z: Any) -> Tensor:
    """A tensor without elements that is laid out as z is, or would be."""
    return torch.empty_strided(z.shape, z.stride(), device="meta")


def _iter(z: Any) -> Any:
    pieces = _unbind(z)
    return pieces if pieces is NotImplemented else iter(pieces)


# Reductions over the classes, chunk by chunk


def _reduced(func: Any, differentiable: bool = True) -> Callable[..., Any]:
    """func(z, dim=-1, ...), of which a gradient is not wanted."""

    def handler(z: Any, *args: Any, **kwargs: Any) -> Any:
        dim, *others = args or (kwargs.pop("dim", None),)
        if not _is_last(z, dim) or "out" in kwargs or (differentiable and _wants_gradient(z)):
            return NotImplemented
        return _by_chunks(z, lambda rows, _: func(rows, -1, *others, **kwargs))

    return handler


def _is_last(z: Any, dim: Any) -> bool:
    (dim,) = dim if isinstance(dim, (tuple, list)) and len(dim) == 1 else (dim,)
    return type(dim) is int and dim in (-1, z.dim() - 1)


def _by_chunks(z: Any, function: Callable[[Tensor, slice], Any]) -> Any:
    """function(some rows of logits [n, V], which), for all rows, put together in the shape of z's rows."""
    source = z._source
    if source.is_example:
        return NotImplemented  # it costs nothing, and how many rows there are may be a symbol
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
        return torch.cat(found).reshape((*lead, *found[0].shape[1:]))
    columns = [torch.cat(c).reshape((*lead, *c[0].shape[1:])) for c in zip(*found, strict=True)]
    return type(found[0])(columns)


def _topk(z: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if not _is_last(z, dim) or _wants_gradient(z):
        return NotImplemented
    return _by_chunks(z, lambda rows, _: torch.topk(rows, k, -1, largest, sorted))


def _gather(z: Any, dim: int, index: Tensor, **kwargs: Any) -> Any:
    whole = index.dim() == z.dim() and index.shape[:-1] == z.shape[:-1]
    if not _is_last(z, dim) or not whole or kwargs or _wants_gradient(z):
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
        if not _is_last(z, dim) or kwargs or _wants_gradient(z):
            return NotImplemented
        source = z._source.then(func, -1, dtype, dtype=dtype)
        return z.form(source, lambda made: func(made, -1, dtype))

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


_CASTS: dict[Any, Callable[..., Any]] = {
    Tensor.float: _cast(torch.float32),
    Tensor.half: _cast(torch.float16),
    Tensor.bfloat16: _cast(torch.bfloat16),
    Tensor.double: _cast(torch.float64),
    Tensor.to: _to,
    Tensor.cpu: _device,
    Tensor.type: _type,
    Tensor.type_as: _type_as,
}
_VIEWS: dict[Any, Callable[..., Any]] = {
    Tensor.contiguous: _itself,
    **dict.fromkeys((*_methods("detach"), Tensor.data.__get__), _detach),  # type: ignore[attr-defined]
    **{
        func: _reshaped(func)
        for func in _methods(
            "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"
        )
    },
    Tensor.__getitem__: _getitem,
    **dict.fromkeys(_methods("select"), _select),
    **dict.fromkeys(_methods("narrow"), _narrow),
    **{func: _cut(func) for func in _methods("split", "chunk")},
    **dict.fromkeys(_methods("unbind"), _unbind),
    Tensor.__iter__: _iter,
}
_HANDLERS: dict[Any, Callable[..., Any]] = {
    **_CASTS,
    **_VIEWS,
    **dict.fromkeys(_methods("clone"), _clone),
    **dict.fromkeys(_methods("is_same_size"), lambda z, other: z.shape == other.shape),
    **dict.fromkeys(_methods("index_select"), _index_select),
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
