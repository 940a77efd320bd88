"""Where a value is something, such as dependent on its row: everywhere, nowhere, or where a tensor says.

The tensor is bool, of the value's shape, and made in the graph: the device finds it when the program runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..graph.builder import Builder
from ..graph.shapes import example_of, same_shape, shape_of, tensor_of
from ..graph.walk import args_of
from . import sizes
from .find import NoHead
from .nodes import on

aten = torch.ops.aten

Where = Node | bool


class Places:
    """Makes such tensors.

    Args:
        build: makes nodes.
        device: where the values are.
    """

    def __init__(self, build: Builder, device: torch.device):
        self.build, self.device = build, device

    def any(self, parts: Iterable[Where]) -> Where:
        return self._combined(aten.logical_or.default, parts, True)

    def all(self, parts: Iterable[Where]) -> Where:
        return self._combined(aten.logical_and.default, parts, False)

    def _combined(self, op: Any, parts: Iterable[Where], final: bool) -> Where:
        parts = list(dict.fromkeys(parts))
        if final in parts:
            return final
        result: Where = not final
        for part in parts:
            if isinstance(part, Node):
                result = self.build(op, result, part) if isinstance(result, Node) else part
        return result

    def not_(self, part: Where) -> Where:
        return self.build(aten.logical_not.default, part) if isinstance(part, Node) else not part

    def chosen(self, node: Node, condition: Node | None, yes: Where, no: Where) -> Where:
        """Over the shape of a node, `yes` where a condition is true, and `no` where it is not.

        Where either is, if the condition is None: not known before the backward.
        """
        if condition is None:
            return self.over_any(node, [yes, no])
        if yes is no:
            return yes
        return self.over_any(node, [self.all([condition, yes]), self.all([self.not_(condition), no])])

    def over_any(self, node: Node, parts: Iterable[Where]) -> Where:
        """Where any part is, over the shape of a node."""
        return self.over(node, self.any(parts))

    def over(self, node: Node, part: Where) -> Where:
        """Over the shape of a node, with which it can be broadcast."""
        if isinstance(part, bool) or same_shape(shape_of(part), shape_of(node)):
            return part
        return self.build(aten.expand.default, part, self.shape(node))

    def moved(self, node: Node, known: Mapping[Node, Where]) -> Where:
        """As a view, or what puts values in places, moves what is `known`; what is not is nowhere."""
        parts = {source: known.get(source, False) for source in node.all_input_nodes if _is_value(source)}
        if all(part is True for part in parts.values()) or not any(parts.values()):
            return any(parts.values())
        tensors = {source: self._tensor(source, part) for source, part in parts.items()}
        return self._moved(node, tensors, False)

    def reduced(self, node: Node, part: Where) -> Where:
        """Where any is of what a node brings together."""
        if isinstance(part, bool):
            return part
        dims, *keepdim = args_of(node)[1:3]
        rank = len(shape_of(part))
        for dim in sorted(((d % rank) for d in (dims if isinstance(dims, list) else [dims])), reverse=True):
            part = self.build(aten.any.dim, part, dim, *keepdim)
        return part

    def numbers_moved(self, node: Node, known: Mapping[Node, Node]) -> Node:
        """The same of numbers; 0 for what is not known."""
        others = [s for s in node.all_input_nodes if _is_value(s) and s not in known]
        zeros = {
            source: self.build(aten.full.default, self.shape(source), 0, dtype=torch.int64, **on(source))
            for source in others
        }
        return self._moved(node, {**known, **zeros}, 0)

    def _moved(self, node: Node, made: Mapping[Node, Node], padding: bool | int) -> Node:
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: made.get(source, source))
        if node.target == aten.constant_pad_nd.default:
            args = (*args[:2], padding)
        old_strides = node.target in (aten.view.default, aten._unsafe_view.default)
        return self.build(aten.reshape.default if old_strides else node.target, *args, **kwargs)

    def _tensor(self, node: Node, part: Where) -> Node:
        if isinstance(part, Node):
            return part
        return self.build(aten.full.default, self.shape(node), part, dtype=torch.bool, **on(node))

    def shape(self, node: Node) -> list[Any]:
        """The shape of a node as numbers and nodes. Raises NoHead where a size is neither."""
        shape = sizes.of_shape(node.graph, shape_of(node))
        if shape is None:
            raise NoHead("a size is no arithmetic of the inputs' sizes")
        return shape

    # Of values that are known

    def not_finite(self, x: Any) -> Where:
        """Where 0 times x is not 0."""
        return self.not_below(x, float("inf"))

    def not_below(self, x: Any, limit: float) -> Where:
        """Where x is not of a size below a limit: as NaN is not."""
        if not isinstance(x, Node):
            return not abs(x) < limit
        if limit == float("inf") and not _is_floating(x):
            return False
        x = self._as_tensor(x)
        if example_of(x).dtype == torch.bool:
            return False
        return self.not_(self.build(aten.lt.Scalar, self.build(aten.abs.default, x), limit))

    def not_zero(self, x: Node) -> Node:
        """Where x is not 0."""
        return self.build(aten.ne.Scalar, x, 0)

    def not_divisor(self, x: Any) -> Where:
        """Where 0 divided by x is not 0."""
        if not isinstance(x, Node):
            return not abs(x) > 0
        size = self.build(aten.abs.default, self._as_tensor(x))
        return self.not_(self.build(aten.gt.Scalar, size, 0))

    def _as_tensor(self, x: Node) -> Node:
        """A number that is an input of the graph, or is made of some, as a tensor."""
        if tensor_of(x) is not None:
            return x
        return self.build(aten.full.default, [], x, dtype=torch.float64, device=self.device, pin_memory=False)


def _is_floating(x: Node) -> bool:
    example = tensor_of(x)
    return example.is_floating_point() if example is not None else not isinstance(x.meta["val"], torch.SymInt)


def _is_value(node: Node) -> bool:
    return tensor_of(node) is not None or isinstance(node.meta.get("val"), (list, tuple))
