"""Read what lies between a product and the statistics, and behind the gradient, as a `Chain`.

Of each element of the logits alone: nothing but numbers is combined with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from ..graph.shapes import example_of
from ..graph.walk import args_of
from ..ops.chains import Chain
from ..ops.row_program import RowProgram, Step
from .calls import stats_call
from .find import Head, source_of_exit
from .kinds import COPIES, is_ordered_view
from .steps import OF_NUMBERS, Steps, Unreadable, Values, literal


def chain_of(head: Head) -> str | None:
    """The chain of a head as text, "" where there is none; None for unknown.

    Args:
        head: of one product, one `row_stats`, and one `row_grad`.
    """
    if not head.chained:
        return ""
    sources = [source_of_exit(node, head) for node in head.exits]
    if any(example_of(source).dtype != example_of(head.product).dtype for source in sources):
        return None
    (stats,), (grad,) = head.stats, head.grads
    before, after = _Elements([head.product]), _Elements([head.product, grad])
    try:
        before.read(head.before_statistics())
        after.read(node for node in head.wide if node is not grad)
        x = before.program([stats_call(stats).z])
        dz = after.program(sources)
    except Unreadable:
        return None
    return Chain(x, dz).encode()


class _Elements(Steps):
    """Nodes as functions of one element of some others."""

    def __init__(self, of: list[Node]):
        super().__init__(len(of))
        self._n_given = len(of) - 1
        self._values: dict[Node, Values] = {node: [[i]] for i, node in enumerate(of)}

    def read(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            self._values[node] = self._of(node)

    def _of(self, node: Node) -> Values:
        if example_of(node).dtype not in OF_NUMBERS:
            raise Unreadable
        is_same = is_ordered_view(node) or (node.target in COPIES and _keeps_dtype(node))
        return self.values(args_of(node)[0], node) if is_same else self.made(node)

    def values(self, arg: Any, user: Node) -> Values:
        if isinstance(arg, (int, float)):
            return [arg]
        if not isinstance(arg, Node):
            raise Unreadable
        if arg in self._values:
            return self._values[arg]
        number = literal(arg)
        if number is None:
            raise Unreadable
        return [number]

    def program(self, results: list[Node]) -> RowProgram:
        """What makes the one value that all of `results` have."""
        values = [self._values[node] for node in results]
        if any(value != values[0] for value in values):
            raise Unreadable
        return RowProgram(1, self._n_given, tuple(Step(*step) for step in self._steps), tuple(values[0]))


def _keeps_dtype(node: Node) -> bool:
    return example_of(node).dtype == example_of(args_of(node)[0]).dtype
