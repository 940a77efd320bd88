"""Views, casts and copies, read backwards: where did this tensor come from, and what became of its rows?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from ..common.compat.graphs import set_grad_enabled
from ..graph.shapes import Size, equal, same_count, same_shape, shape_of, tensor_of
from ..graph.timeline import Timeline
from . import spellings
from .row_views import Permute, Reshape, RowView, Slice, follow_axis, row_shape, slice_steps
from .steps import View

HALF = (torch.float16, torch.bfloat16)

# (the vocabulary's axis in the source, what happened to the rows since)
Back = tuple[int, tuple[RowView, ...]]


def keeps_order(node: Node, source: Node) -> bool:
    """Whether a view or copy holds all elements of its source in the same order."""
    spelled = spellings.read(node)
    assert spelled is not None
    step, args = spelled
    if step.view in (View.SAME, View.RESHAPE):
        return True
    is_basic = step.name == "getitem" and _is_basic(args["index"])
    return is_basic and same_count(shape_of(node), shape_of(source))


def _is_basic(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in items)


def viewing(node: Node) -> View | None:
    """What a node does to the rows of its `input`, if it computes nothing."""
    step = spellings.step_of(node)
    return None if step is None else step.view


def viewed(node: Node) -> Node | None:
    """The source of a view, of a copy, or of a cast by which labels or statistics lose nothing."""
    spelled = spellings.read(node)
    if spelled is None or spelled[0].view is None:
        return None
    source = spelled[1].get("input")
    a, b = tensor_of(node), tensor_of(source)
    if spelled[0].view is View.RESHAPE and a is not None and b is not None and a.dtype != b.dtype:
        return None  # x.view(dtype) reads the same bits as something else
    if a is None or b is None or a.device != b.device or type(a) is not type(b):
        return None
    return source if cast_keeps(b.dtype, a.dtype) else None


def forget_no_copies(graph: Graph) -> None:
    """Let the users of a cast or copy that is its source itself, where gradients are off, read the source.

    x.float() is x where that is float32, and has its gradient under no_grad as well.
    """
    if not any(node.target is set_grad_enabled for node in graph.nodes):
        return
    timeline = Timeline(graph)
    for node, position in timeline.position.items():
        if timeline.grad_mode(position) is True or viewing(node) is not View.SAME:
            continue
        source = viewed(node)
        if source is not None and timeline.shares_storage(node, source):
            node.replace_all_uses_with(source, delete_user_cb=lambda user: user.op != "output")
            if not node.users:
                graph.erase_node(node)


def cast_keeps(source: torch.dtype, result: torch.dtype) -> bool:
    """Whether a cast loses nothing, and statistics are taken in the same precision before it and after."""
    if source.is_floating_point:
        return source == result or (source in HALF and result == torch.float32)
    integers = not any(d.is_floating_point or d.is_complex or d == torch.bool for d in (source, result))
    return source == result or (integers and source.itemsize < result.itemsize)


def step_back(node: Node, source: Node, axis: int) -> Back | None:
    """(the vocabulary's axis in the source, steps over rows) of a view with the vocabulary on `axis`."""
    spelled = spellings.read(node)
    assert spelled is not None
    assert spelled[0].view is not None
    return _BACK[spelled[0].view](node, source, axis, spelled[1])


def _same_back(node: Node, source: Node, axis: int, args: dict[str, Any]) -> Back | None:
    return (axis, ()) if same_shape(shape_of(node), shape_of(source)) else None


def _reshape_back(node: Node, source: Node, axis: int, args: dict[str, Any]) -> Back | None:
    from_axis = follow_axis(shape_of(node), axis, shape_of(source))
    return None if from_axis is None else (from_axis, (Reshape(source, from_axis, node, axis),))


def _slice_back(node: Node, source: Node, axis: int, args: dict[str, Any]) -> Back | None:
    index = args["index"] if "index" in args else _narrowed(len(shape_of(source)), args)
    cut = slice_steps(index, shape_of(source), shape_of(node), axis)
    if cut is None or not _most_rows_left(row_shape(source, axis), cut):
        return None
    return axis, () if cut.is_whole else (cut,)


def _narrowed(rank: int, args: dict[str, Any]) -> tuple[Any, ...] | None:
    """The index that `x.narrow(dim, start, length)` is."""
    if not isinstance(args["dim"], int):
        return None
    return (slice(None),) * (args["dim"] % rank) + (slice(args["start"], None), ...)


def _most_rows_left(shape: tuple[Any, ...], cut: Slice) -> bool:
    """Statistics of rows that are cut off are wasted work: worth it for few of them."""
    return all(
        not isinstance(size, int) or 2 * (left + right) <= size
        for size, left, right in zip(shape, cut.left, cut.right, strict=True)
    )


def _order_back(node: Node, source: Node, axis: int, args: dict[str, Any]) -> Back | None:
    order = dimension_order(len(shape_of(source)), args)
    if order is None:
        return None
    from_axis = order[axis]
    rows = [d for d in range(len(order)) if d != from_axis]
    moved = tuple(rows.index(d) for d in order if d != from_axis)
    return from_axis, (Permute(moved),) if moved != tuple(range(len(moved))) else ()


def dimension_order(rank: int, args: dict[str, Any]) -> list[int] | None:
    """The `permute` argument that a transpose, permute or movedim amounts to."""
    if not all(isinstance(d, int) for d in _flat(args)):
        return None
    order = list(range(rank))
    if len(args) == 1:  # x.t()
        return order[::-1]
    if "dims" in args:
        return [d % rank for d in args["dims"]]
    if "dim0" in args:
        a, b = args["dim0"] % rank, args["dim1"] % rank
        order[a], order[b] = order[b], order[a]
        return order
    source, destination = args["source"], args["destination"]
    if not isinstance(source, int) or not isinstance(destination, int):
        return None
    order.insert(destination % rank, order.pop(source % rank))
    return order


def _flat(args: dict[str, Any]) -> list[Any]:
    values = [v for name, v in args.items() if name != "input"]
    return [d for v in values for d in (v if isinstance(v, (tuple, list)) else (v,))]


_BACK: dict[View, Callable[..., Back | None]] = {
    View.SAME: _same_back,
    View.RESHAPE: _reshape_back,
    View.ORDER: _order_back,
    View.SLICE: _slice_back,
}


def counted(node: Any) -> tuple[int, Size] | None:
    """(dimension from the end, length) of what holds 0, 1, 2, ... along one dimension."""
    if isinstance(node, (list, tuple, range)):
        return (-1, len(node)) if list(node) == list(range(len(node))) else None
    spelled = spellings.read(node) if isinstance(node, Node) else None
    example = tensor_of(node)
    if spelled is None or example is None or example.is_floating_point():
        return None
    step, args = spelled
    if step.name == "arange":
        from_zero = first_and_step(args) == (0, 1) and example.dim() == 1
        return (-1, example.shape[0]) if from_zero else None
    source = viewed(node) if step.view else args.get("input") if step.name == "expand" else None
    inner = None if source is None else counted(source)
    if inner is None or source is None:
        return None
    dim, length = inner
    if step.name == "expand":
        return inner if equal(example.shape[dim], length) else None
    if not keeps_order(node, source):
        return None
    along = [i for i, size in enumerate(example.shape) if equal(size, length)]
    if len(along) != 1 or not equal(math.prod(example.shape), length):
        return None
    return along[0] - example.dim(), length


def first_and_step(args: dict[str, Any]) -> tuple[Any, Any]:
    """The first number of an arange with these arguments, and how far apart its numbers are."""
    numbers = args["numbers"]
    start = numbers[0] if len(numbers) > 1 else args.get("start", 0)
    return start, numbers[2] if len(numbers) > 2 else args.get("step", 1)


def broadcast_operand(node: Node) -> Node | None:
    """Which tensor an element of the result of torch.broadcast_tensors is."""
    step = spellings.step_of(node)
    if step is None or step.name != "getitem":
        return None
    args = spellings.arguments(node, step)
    source, index = args["input"], args["index"]
    inner = spellings.read(source) if isinstance(source, Node) else None
    if inner is None or inner[0].name != "broadcast_tensors" or not isinstance(index, int):
        return None
    return inner[1]["tensors"][index]
