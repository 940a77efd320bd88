"""Fake tensors that stand for what is being lowered."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor

from .graphs import tree_map
from .inductor import is_buffer, virtualized
from .versions import of_supported_torch

with of_supported_torch():
    from torch._inductor import ir


def stand_ins(values: Any) -> Any | None:
    """`values` with a fake tensor in the place of each value of Inductor's; None where sizes are symbolic.

    In memory it begins where the value does in what it is a view of.
    """
    try:
        return tree_map(_stand_in, values, is_leaf=lambda x: isinstance(x, ir.IRNode))
    except _SymbolicError:
        return None


class _SymbolicError(Exception):
    """A size is known at run time alone."""


def _stand_in(x: Any) -> Any:
    if isinstance(x, sympy.Basic):
        return _numbers([x])[0]
    if not isinstance(x, ir.IRNode):
        return x
    size = _numbers(x.get_size())
    if is_buffer(x):
        layout = x.get_layout()
        stride, (offset,) = _numbers(layout.stride), _numbers([layout.offset])
    else:
        stride, offset = _numbers(ir.FlexibleLayout.contiguous_strides(x.get_size())), 0
    elements = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    with virtualized.fake_mode:
        memory = torch.empty(max(elements, 0), dtype=x.get_dtype(), device=x.get_device())
        made: Tensor = memory.as_strided(size, stride, offset)
    return made


def _numbers(sizes: Any) -> list[int]:
    if not all(getattr(size, "is_Integer", isinstance(size, int)) for size in sizes):
        raise _SymbolicError
    return [int(size) for size in sizes]
