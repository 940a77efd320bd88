"""Read nodes of a graph as functions of values, in the steps of a `RowProgram`.

A node is as many values as it has numbers for what a program is of: a row, or an element.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..common.compat.graphs import unset_fake_temporarily
from ..graph.shapes import example_of, tensor_of
from ..graph.walk import args_of
from ..ops.row_program import FUNCTIONS, NAMES, OF_TRUTHS, Argument, Number
from .kinds import CAST

aten = torch.ops.aten

_LITERALS = {aten.full.default: 1, aten.scalar_tensor.default: 0}  # the place of the number
# Those of 16 bits are as Inductor computes them, in float32 and not rounded in between.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OF_NUMBERS = (*FLOATS, torch.bool)

Values = list[Argument]


class Unreadable(Exception):
    """What a node is made by is no step of a program."""


class Steps:
    """Steps of a program, each once.

    Args:
        first: the place of the first among the values.
    """

    def __init__(self, first: int):
        self._first = first
        self._steps: list[tuple[str, tuple[Argument, ...]]] = []
        self._places: dict[str, Argument] = {}

    def values(self, arg: Any, user: Node) -> Values:
        """Of an argument that `user` has."""
        raise NotImplementedError

    def made(self, node: Node) -> Values:
        """What a function makes of numbers. Raises Unreadable."""
        args = args_of(node)
        if node.target == CAST:
            dtype = example_of(args[0]).dtype
            if dtype not in OF_NUMBERS:
                raise Unreadable
            values = self.values(args[0], node)
            if (dtype == torch.bool) == (example_of(node).dtype == torch.bool):
                return values
            return self.each("float", [values]) if dtype == torch.bool else self.each("ne", [values, [0]])
        if node.target == aten.pow.Tensor_Scalar and args[1] in (1, 2):
            values = self.values(args[0], node)
            return values if args[1] == 1 else self.each("mul", [values, values])
        if node.target == aten.clamp.default:
            values = self.values(args[0], node)
            for name, bound in zip(("maximum", "minimum"), args[1:], strict=False):
                values = values if bound is None else self.each(name, [values, self.values(bound, node)])
            return values
        function = function_of(node)
        if function is None or not (function in OF_TRUTHS or _is_of_floats(node)):
            raise Unreadable
        return self.each(function, [self.values(arg, node) for arg in args])

    def each(self, name: str, operands: list[Values]) -> Values:
        count = max(map(len, operands))
        if any(len(values) not in (1, count) for values in operands):
            raise Unreadable
        return [self._step(name, tuple(v[i % len(v)] for v in operands)) for i in range(count)]

    def _step(self, name: str, args: tuple[Argument, ...]) -> Argument:
        key = repr((name, args))  # as numbers True, 1 and 1.0 are equal
        if key not in self._places:
            self._places[key] = [self._first + len(self._steps)]
            self._steps.append((name, args))
        return self._places[key]


def function_of(node: Node) -> str | None:
    """The function that a step makes of a node's arguments; None where it has more, such as alpha."""
    name = NAMES.get(node.target)
    is_all = name is not None and len(args_of(node)) == FUNCTIONS[name].arity and not node.kwargs
    return name if is_all else None


def literal(node: Node) -> Number | None:
    """The number that a tensor is full of."""
    number = args_of(node)[_LITERALS[node.target]] if node.target in _LITERALS else None
    if not isinstance(number, (int, float)):
        return None
    with unset_fake_temporarily():
        return torch.full((), number, dtype=example_of(node).dtype).item()


def _is_of_floats(node: Node) -> bool:
    """Whether Triton computes in floats what a node does: of truth values it has other functions."""
    sources = map(tensor_of, node.all_input_nodes)
    return any(source is not None and source.is_floating_point() for source in sources)
