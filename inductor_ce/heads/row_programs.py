"""Read what a joint graph makes of the statistics of a row as a program of that row alone.

The nodes between statistics and coefficients have numbers of all rows, in views of any shape. Where `Fact`s
say that each holds the rows in their order, once or several times over, a node is as many values, and a
function of nodes that of their values.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from ..common.compat.graphs import unset_fake_temporarily
from ..graph.shapes import equal, example_of, shape_of, tensor_of
from ..graph.walk import args_of
from ..ops.row_program import Argument, RowProgram, Step
from .calls import grad_call, stats_call
from .facts import EARLY, NO_ROW, Facts
from .steps import OF_NUMBERS, Steps, Unreadable, Values, function_of, literal

aten = torch.ops.aten

_SAME = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default),
    *(aten.alias.default, aten.detach.default, aten.clone.default),
}


class OfRows(NamedTuple):
    """A program, and of which nodes it is given a number: of each row, [N] in some shape, or of all, [1]."""

    program: RowProgram
    given: tuple[Node, ...]


def row_program(stats: Node, grad: Node, between: Iterable[Node], facts: Facts) -> OfRows | None:
    """What makes the coefficients of `grad`, a `row_grad`, of `stats`, a `row_stats`; None for unknown.

    Args:
        stats, grad: of the same logits, labels and weights.
        between: what lies between, in the order of the graph.
        facts: about these.
    """
    own, its = stats_call(stats), grad_call(grad)
    if (own.z, own.labels, own.weights, own.which) != (its.z, its.labels, its.weights, its.which):
        return None
    with unset_fake_temporarily():
        reader = _Reader(stats, len(own.rows), facts)
        for node in between:
            reader.read(node)
    try:
        maxima, results = reader.values(its.m, its.m), reader.values(its.coefficients, its.coefficients)
    except Unreadable:
        return None
    if maxima != [[0]] or len(results) != len(own.rows):
        return None
    return OfRows(reader.finish(results), tuple(reader.given))


class _Reader(Steps):
    """The values of nodes.

    Until all is known a value has its place among the statistics, from K on among the steps, and from -1
    downwards among what is given.
    """

    def __init__(self, stats: Node, k: int, facts: Facts):
        super().__init__(k)
        self._facts, self._k = facts, k
        self._rows, self._own = shape_of(stats)[1], torch.arange(facts.shape_of(stats)[1])
        self._values: dict[Node, Values] = {stats: [[i] for i in range(k)]}
        self.given: list[Node] = []

    def read(self, node: Node) -> None:
        """Find the values of a node, if it has any."""
        if self._facts.get(node, EARLY).rows is not None:
            with contextlib.suppress(Unreadable):
                self._values[node] = self._of(node)

    def _of(self, node: Node) -> Values:
        if node.target == aten.unbind.int:
            return self._parts(node)
        example = tensor_of(node)
        if example is None or example.dtype not in OF_NUMBERS:
            raise Unreadable
        values = self._rule(node)
        rows = self._facts[node].rows
        assert rows is not None
        n = len(self._own)
        if rows.numel() != len(values) * n:
            raise Unreadable
        rows = rows.reshape(len(values), n)
        if not bool(((rows == self._own) | (rows == NO_ROW)).all()):
            raise Unreadable
        return values

    def _rule(self, node: Node) -> Values:
        source, *rest = args_of(node)
        if node.target in _SAME:
            return self.values(source, source)
        if node.target in (aten.select.int, operator.getitem):
            index = rest[-1]
            if not isinstance(index, int) or (node.target == aten.select.int and rest[0] != 0):
                raise Unreadable
            parts = self._parts(node) if node.target == aten.select.int else self.values(source, source)
            return [parts[index]]
        if node.target == aten.cat.default and (not rest or rest[0] == 0):
            return [value for part in source for value in self.values(part, part)]
        return self.made(node)

    def _parts(self, node: Node) -> Values:
        """What a node takes apart along the first dimension."""
        source, *rest = args_of(node)
        values = self.values(source, source)
        if (rest and rest[0] != 0) or shape_of(source)[0] != len(values):
            raise Unreadable
        return values

    def values(self, arg: Any, user: Node) -> Values:
        """Of an argument that `user` has."""
        if not isinstance(arg, Node):
            if isinstance(arg, (int, float)):
                return [arg]
            raise Unreadable
        if arg in self._values:
            return self._values[arg]
        fact = self._facts.get(arg, EARLY)
        if fact.rows is not None or tensor_of(arg) is None:  # a size that is symbolic is no tensor
            raise Unreadable
        if fact.is_factor(arg):
            return [1.0]
        if (number := literal(arg)) is not None:
            return [number]
        if (seen := self._seen_through(arg, user)) is not None:
            return seen
        count = example_of(arg).numel()
        is_of_rows = equal(count, self._rows) and equal(example_of(user).numel(), self._rows)
        is_wide = is_of_rows and example_of(arg).dtype == torch.float64
        if is_wide or not (is_of_rows or equal(count, 1)):
            raise Unreadable
        if arg not in self.given:
            self.given.append(arg)
        return [[-1 - self.given.index(arg)]]

    def _seen_through(self, node: Node, user: Node) -> Values | None:
        """Of a function, or view, of one node that needs no statistics: that is given in its place."""
        sources = node.all_input_nodes
        if len(sources) != 1 or node.kwargs or example_of(node).dtype != torch.float32:
            return None
        (source,) = sources
        own = tensor_of(source)
        if own is None or own.dtype != torch.float32 or self._facts.get(source, EARLY).why_not:
            return None
        if not equal(own.numel(), example_of(node).numel()) and node.target != aten.expand.default:
            return None
        if node.target in _SAME:
            return self.values(source, user)
        function = function_of(node)
        if function is None:
            return None
        return self.each(function, [self.values(arg, user) for arg in args_of(node)])

    def finish(self, results: Values) -> RowProgram:
        """The program, with places as it has them."""
        g = len(self.given)

        def placed(argument: Argument) -> Argument:
            if not isinstance(argument, list):
                return argument
            (at,) = argument
            return [self._k - 1 - at if at < 0 else at + g if at >= self._k else at]

        steps = tuple(Step(name, tuple(map(placed, args))) for name, args in self._steps)
        return RowProgram(self._k, g, steps, tuple(map(placed, results)))
