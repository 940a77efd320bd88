"""Read what lies between a product and the statistics, and behind the gradient, as a `Chain`.

Of each element of the logits alone: nothing but numbers is combined with them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.fx import Node

from ..graph.shapes import example_of, tensor_of
from ..graph.walk import args_of, reached
from ..ops.chains import Chain
from ..ops.row_program import RowProgram, Step
from .calls import stats_call
from .find import Head, source_of_exit
from .kinds import COPIES, count_of, is_of_size, is_ordered_view, is_pointwise, unviewed
from .steps import OF_NUMBERS, Steps, Unreadable, Values, literal


def chain_of(head: Head) -> str | None:
    """The chain of a head as text, "" where there is none; None for unknown.

    Args:
        head: of one product, one `row_stats`, and one `row_grad`.
    """
    if not head.chained:
        return ""
    (stats,), (grad,) = head.stats, head.grads
    sources = [source_of_exit(node, head) for node in head.exits]
    return _chain(head.product, stats_call(stats).z, grad, sources)


class Around(NamedTuple):
    """A chain of logits that no head makes.

    Attributes:
        root: what it begins with.
        chain: as text, "" where there is none.
        gradients: the nodes that have the gradient by `root`, behind the chain.
    """

    root: Node
    chain: str
    gradients: list[Node]


def chain_around(stats: Node, grad: Node) -> Around | None:
    """What lies before a `row_stats`, and behind the `row_grad` of its logits; None for unknown."""
    z = stats_call(stats).z
    base = unviewed(z)
    if not is_pointwise(base):
        return Around(base, "", [grad])
    before = set(reached([z], _wide_sources))
    roots = [node for node in before if not _wide_sources(node)]
    if len(roots) != 1:
        return None
    (root,), after = roots, {grad}
    elements = _Elements([root, grad])
    for node in stats.graph.nodes:
        if not after.isdisjoint(_wide_sources(node)) and elements.has(node):
            after.add(node)
    gradients = [node for node in after if not after.issuperset(node.users)]
    chain = _chain(root, z, grad, gradients)
    return None if chain is None else Around(root, chain, gradients)


def _wide_sources(node: Node) -> list[Node]:
    """Of a function of each element, what has as many."""
    if not (is_pointwise(node) or is_ordered_view(node)):
        return []
    return [source for source in node.all_input_nodes if is_of_size(source, count_of(node))]


def _chain(root: Node, z: Node, grad: Node, gradients: list[Node]) -> str | None:
    """What makes z of `root`, and what all of `gradients` are of that and of `grad`, as text."""
    if any(example_of(node).dtype != example_of(root).dtype for node in gradients):
        return None
    try:
        before = _Elements([root]).program([z])
        return Chain(before, _Elements([root, grad]).program(gradients)).encode()
    except Unreadable:
        return None


class _Elements(Steps):
    """Nodes as functions of one element of some others."""

    def __init__(self, of: list[Node]):
        super().__init__(len(of))
        self._n_given = len(of) - 1
        self._values: dict[Node, Values] = {node: [[i]] for i, node in enumerate(of)}

    def has(self, node: Node) -> bool:
        """Whether a node is one."""
        try:
            self.values(node, node)
        except Unreadable:
            return False
        return True

    def values(self, arg: Any, user: Node) -> Values:
        if isinstance(arg, (int, float)):
            return [arg]
        if not isinstance(arg, Node) or tensor_of(arg) is None:
            raise Unreadable
        if arg not in self._values:
            number = literal(arg)
            self._values[arg] = self._of(arg) if number is None else [number]
        return self._values[arg]

    def _of(self, node: Node) -> Values:
        if node.op != "call_function" or example_of(node).dtype not in OF_NUMBERS:
            raise Unreadable
        is_same = is_ordered_view(node) or (node.target in COPIES and _keeps_dtype(node))
        return self.values(args_of(node)[0], node) if is_same else self.made(node)

    def program(self, results: list[Node]) -> RowProgram:
        """What makes the one value that all of `results` have."""
        values = [self.values(node, node) for node in results]
        if any(value != values[0] for value in values):
            raise Unreadable
        return RowProgram(1, self._n_given, tuple(Step(*step) for step in self._steps), tuple(values[0]))


def _keeps_dtype(node: Node) -> bool:
    return example_of(node).dtype == example_of(args_of(node)[0]).dtype
