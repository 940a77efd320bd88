"""What lies between the statistics of rows and the coefficients of gradients, and scalars that all share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..graph.builder import Builder
from ..graph.shapes import equal, example_of
from ..ops import DIVERGENCE
from .calls import narrow_args, normalisers_of
from .facts import Factor, Facts
from .nodes import on
from .row_programs import OfRows, row_program

aten = torch.ops.aten

_OF_OLD_STRIDES = (aten.view.default, aten._unsafe_view.default)  # of what may have other strides now


def between(statistics: Iterable[Node], wanted: Iterable[Node], facts: Facts) -> set[Node]:
    """All between statistics, or a factor, and what is wanted."""
    found: set[Node] = set()
    ends = set(statistics)
    stack = list(wanted)
    while stack:
        node = stack.pop()
        fact = facts[node]
        if node in found or node in ends or (fact.rows is None and not fact.factor):
            continue
        found.add(node)
        if node.target == DIVERGENCE:
            stack += normalisers_of(node)
        elif not fact.is_factor(node):
            stack += node.all_input_nodes
    return found


def program_between(stats: Node, grad: Node, facts: Facts) -> tuple[OfRows, list[Node]] | None:
    """The program of a row between `row_stats` and `row_grad`, and what it is read of; None for unknown."""
    found = between([stats], narrow_args(grad), facts)
    nodes = [node for node in stats.graph.nodes if node in found]
    program = row_program(stats, grad, nodes, facts)
    return None if program is None else (program, nodes)


def again(build: Builder, node: Node, made: Mapping[Node, Node]) -> Node:
    """A node of what stands for its sources."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda source: made.get(source, source))
    target = aten.reshape.default if node.target in _OF_OLD_STRIDES else node.target
    return build(target, *args, **kwargs)


class Early:
    """Nodes that no statistics are needed for, a factor being 1 in them.

    Args:
        build: makes the nodes.
        nodes: those that depend on statistics, or on a factor.
        facts: about them.
    """

    def __init__(self, build: Builder, nodes: Iterable[Node], facts: Facts):
        self._build, self._nodes, self._facts = build, set(nodes), facts
        self._made: dict[Node, Node] = {}
        self._ones: dict[Node, Node] = {}

    def of(self, node: Node) -> Node:
        """What stands for a node before statistics are known: itself, where nothing is needed for it."""
        if node not in self._nodes:
            return node
        if node not in self._made:
            if self._facts[node].is_factor(node):
                self._made[node] = self.one(node)
            else:
                self._made[node] = again(self._build, node, {s: self.of(s) for s in node.all_input_nodes})
        return self._made[node]

    def one(self, node: Node) -> Node:
        """1 in the place of a factor."""
        if node not in self._ones:
            example = example_of(node)
            size = list(example.shape)
            self._ones[node] = self._build(aten.full.default, size, 1.0, dtype=example.dtype, **on(node))
        return self._ones[node]

    def given(self, program: OfRows) -> OfRows:
        """A program of a row, given nodes as the forward has them, [N] or []."""
        given = []
        for node in map(self.of, program.given):
            size = [] if equal(example_of(node).numel(), 1) else [-1]
            given.append(self._build(aten.reshape.default, node, size))
        return program._replace(given=tuple(given))


def scalar_of(build: Builder, factor: Factor) -> Node | None:
    """The value of a factor, []; None for 1."""
    result = None
    for node, power in factor:
        if example_of(node).dim():
            node = build(aten.reshape.default, node, [])
        for _ in range(abs(power)):
            if result is None and power < 0:
                result = build(aten.reciprocal.default, node)
            elif result is None:
                result = node
            else:
                result = build(aten.mul.Tensor if power > 0 else aten.div.Tensor, result, node)
    return result
