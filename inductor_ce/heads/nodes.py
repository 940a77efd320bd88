"""Nodes that make new tensors, and nodes of operators that write to some."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ..common.compat.graphs import auto_functionalized
from ..graph.builder import Builder
from ..graph.shapes import example_of
from ..ops.products import PRODUCT_INTO

aten, prims = torch.ops.aten, torch.ops.prims


def empty(build: Builder, size: list[Any], dtype: torch.dtype, device: torch.device) -> Node:
    return build(aten.empty.memory_format, size, dtype=dtype, device=device, pin_memory=False)


def iota(build: Builder, size: Any, dtype: torch.dtype, device: torch.device) -> Node:
    """0, 1, ... up to a size."""
    kwargs = {"start": 0, "step": 1, "dtype": dtype, "device": device, "requires_grad": False}
    return build(prims.iota.default, size, **kwargs)


def on(node: Node) -> dict[str, Any]:
    """Where a new tensor is made beside a node's."""
    return {"device": example_of(node).device, "pin_memory": False}


def into(
    build: Builder, out: Node, a: Node, b: Node, *, start: Any = 0, accumulate: bool = False, **limit: Any
) -> Node:
    """`product_into` as a function."""
    made = in_place(build, PRODUCT_INTO, {"out": out}, a=a, b=b, start=start, accumulate=accumulate, **limit)
    return build(operator.getitem, made, 1)


def in_place(build: Builder, op: Any, written: dict[str, Node], **others: Any) -> Node:
    """An operator as a function: (what it returns, *what it has written).

    Inductor writes in place, as nobody else reads what is written.
    """
    places = {f"_{name}_base_index": i for i, name in enumerate(written)}
    return build(auto_functionalized, op, **others, **places, _all_bases=[*written.values()])
