"""Graphs of ATen operators, as `torch.export` and `make_fx` leave them, in the words of torch.

Each operator of the table of steps becomes the function or method of torch that calls it, for the rest of the
package knows those alone: what the graph computes is the same. What else is in the graph stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from ..common.compat.graphs import OpOverload
from ..graph.shapes import tensor_of
from . import spellings
from .steps import STEPS

aten, prims = torch.ops.aten, torch.ops.prims

# (function, or name of a method), arguments, keyword arguments
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]

_REDUCTIONS = ("none", "mean", "sum")


def to_torch(graph: Graph) -> bool:
    """Let a graph with a loss in operators of ATen call torch in their place. Returns whether it does."""
    calls = {node: call for node in graph.nodes if (call := _call(node)) is not None}
    if not any(_normalises(call[0]) for call in calls.values()):
        return False
    for node, call in calls.items():
        _become(node, call)
    for node in [n for n in graph.nodes if n.target in _PAIRS]:
        _first_of_pair(graph, node)
    for node in [n for n in graph.nodes if n.target is aten._assert_tensor_metadata.default]:
        graph.erase_node(node)  # it holds of the examples, and for them the graph is compiled
    return True


def _normalises(target: Any) -> bool:
    step = spellings.step_called(target)
    return target is _SPLIT or (step is not None and (step.normalises or step.is_loss))


def _become(node: Node, call: Call) -> None:
    target, args, kwargs = call
    if target is _SPLIT:
        return
    node.op = "call_method" if isinstance(target, str) else "call_function"
    node.target, node.args, node.kwargs = target, args, kwargs


def _call(node: Node) -> Call | None:
    """What calls the operator that a node calls, None for another node."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    if node.target in _OTHERWISE:
        return _OTHERWISE[node.target](**_arguments(node))
    if node.target in _PAIRS:
        return _SPLIT, (), {}
    if node.target.namespace != "aten":
        return None
    target = _SAME_NAME.get(_name(node))
    return None if target is None or "self" in node.kwargs else (target, node.args, dict(node.kwargs))


def _name(node: Node) -> str:
    """The operator's, without its overload."""
    return str(node.target).split(".")[1]


def is_backward(node: Node) -> bool:
    """Whether a node is the backward of a loss, or of its log-probabilities, written out."""
    return node.target in _BACKWARDS


def _arguments(node: Node) -> dict[str, Any]:
    """Arguments by the names of the schema, `self` without its meaning in Python."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {"x" if name == "self" else name: value for name, value in given.items()}


def _named(function: Any) -> str:
    return getattr(function, "__name__", "")


# Where operator and function have one name they have the same parameters.
_TARGETS = [target for step in STEPS for target in step.targets]
_SAME_NAME: dict[str, Any] = {
    **{target: target for target in _TARGETS if isinstance(target, str)},
    **{
        _named(target): target
        for target in _TARGETS
        if not isinstance(target, (str, tuple)) and getattr(torch, _named(target), None) is target
    },
    "linear": F.linear,
    "addmm": torch.addmm,
    "one_hot": F.one_hot,
}


def _log_softmax(x: Node, dim: int, half_to_float: bool) -> Call:
    return torch.log_softmax, (x, dim), {"dtype": torch.float32} if half_to_float else {}


def _softmax(x: Node, dim: int, half_to_float: bool) -> Call:
    return torch.softmax, (x, dim), {"dtype": torch.float32} if half_to_float else {}


def _cross_entropy(x: Node, target: Node, weight: Any = None, reduction: int = 1, **rest: Any) -> Call:
    return F.cross_entropy, (x, target, weight), {"reduction": _REDUCTIONS[reduction], **rest}


def _nll_loss(
    x: Node, target: Node, weight: Any = None, reduction: int = 1, ignore_index: int = -100
) -> Call:
    return (
        F.nll_loss,
        (x, target, weight),
        {"reduction": _REDUCTIONS[reduction], "ignore_index": ignore_index},
    )


def _kl_div(x: Node, target: Node, reduction: int = 1, *, log_target: bool = False) -> Call:
    return F.kl_div, (x, target), {"reduction": _REDUCTIONS[reduction], "log_target": log_target}


def _to(x: Node, dtype: Any = None, device: Any = None, copy: bool = False, **_: Any) -> Call:
    given = {"dtype": dtype, "device": device}
    kwargs = {name: value for name, value in given.items() if value is not None}
    return "to", (x,), {**kwargs, **({"copy": True} if copy else {})}


def _to_copy(x: Node, dtype: Any = None, device: Any = None, **_: Any) -> Call:
    return _to(x, dtype, device, copy=True)


def _convert(a: Node, dtype: Any) -> Call:
    return _to(a, dtype)


def _sum(x: Node, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Call:
    return _reduce(torch.sum, x, dim, keepdim, dtype)


def _mean(x: Node, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Call:
    return _reduce(torch.mean, x, dim, keepdim, dtype)


def _reduce(function: Callable[..., Any], x: Node, dim: Any, keepdim: bool, dtype: Any) -> Call:
    """Over no dimension is over all."""
    kwargs = {} if dtype is None else {"dtype": dtype}
    return function, (x, dim, keepdim) if dim or keepdim else (x,), kwargs


def _slice(x: Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Call:
    rank = len(tensor_of(x).shape)  # type: ignore[union-attr]
    index = (*(slice(None),) * (dim % rank), slice(start, end, None if step == 1 else step))
    return operator.getitem, (x, index), {}


def _index(x: Node, indices: Any) -> Call:
    return operator.getitem, (x, tuple(slice(None) if i is None else i for i in indices)), {}


def _size(x: Node, dim: int) -> Call:
    return "size", (x, dim), {}


def _split(x: Node, split_sizes: Any, dim: int = 0) -> Call:
    return torch.split, (x, split_sizes, dim), {}


def _same(x: Node, **_: Any) -> Call:
    return operator.getitem, (x, Ellipsis), {}


def _copy(x: Node) -> Call:
    return "clone", (x,), {}


_BACKWARDS = {
    aten._log_softmax_backward_data.default,
    aten.nll_loss_backward.default,
    aten.nll_loss2d_backward.default,
}
_SPLIT = object()  # the first of two results is what torch has a function for
_PAIRS = {aten.nll_loss_forward.default, aten.nll_loss2d_forward.default}
_OTHERWISE: dict[Any, Callable[..., Call]] = {
    aten._log_softmax.default: _log_softmax,
    aten._softmax.default: _softmax,
    aten.cross_entropy_loss.default: _cross_entropy,
    aten.nll_loss.default: _nll_loss,
    aten.nll_loss_nd.default: _nll_loss,
    aten.nll_loss2d.default: _nll_loss,
    aten.kl_div.default: _kl_div,
    aten.to.dtype: _to,
    aten.to.dtype_layout: _to,
    aten.to.device: _to,
    aten._to_copy.default: _to_copy,
    prims.convert_element_type.default: _convert,
    aten.sum.dim_IntList: _sum,
    aten.mean.dim: _mean,
    aten.slice.Tensor: _slice,
    aten.index.Tensor: _index,
    aten.sym_size.int: _size,
    aten.split.Tensor: lambda x, split_size, dim=0: _split(x, split_size, dim),
    aten.split_with_sizes.default: _split,
    aten._unsafe_view.default: lambda x, size: ("reshape", (x, size), {}),
    aten.alias.default: _same,
    aten.lift_fresh_copy.default: _copy,
}


def _first_of_pair(graph: Graph, node: Node) -> None:
    """Let nll_loss be what `node` gives first; the sum of weights that it gives beside stays with it."""
    first = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    if not first:
        return
    target, args, kwargs = _nll_loss(**_arguments(node))
    with graph.inserting_before(node):
        loss = graph.call_function(target, args, kwargs)
    loss.meta = dict(first[0].meta)
    if "stack_trace" in node.meta:
        loss.meta["stack_trace"] = node.meta["stack_trace"]
    for user in first:
        user.replace_all_uses_with(loss)
        graph.erase_node(user)
    if not node.users:
        graph.erase_node(node)
