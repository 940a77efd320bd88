"""The row that each element of a value is of, as a tensor of the graph: moved as the values are."""

from __future__ import annotations

import torch
from torch.fx import Node

from ..common.compat.distributed import ALL_GATHER, WAIT
from ..common.compat.graphs import unset_fake_temporarily
from ..graph.walk import args_of
from .facts import NO_ROW, Facts
from .find import Head
from .kinds import is_pointwise
from .nodes import iota
from .row_rules import is_moved, is_reduced
from .where import Places

aten = torch.ops.aten


class RowNumbers:
    """The rows of values that are made of statistics.

    Args:
        places: makes nodes.
        head: whose statistics they are.
        facts: about the values, each of which is of its own row.
    """

    def __init__(self, places: Places, head: Head, facts: Facts):
        self._places, self._head, self._facts = places, head, facts
        self._known: dict[Node, Node] = {}

    def of(self, node: Node) -> Node:
        """int64, of the shape of `node`; what is of no row has any."""
        if node not in self._known:
            self._known[node] = self._found(node)
        return self._known[node]

    def _found(self, node: Node) -> Node:
        build = self._places.build
        if node in self._head.stats:
            return build(aten.expand.default, self._all(node), self._places.shape(node))
        sources = [s for s in node.all_input_nodes if s in self._head.stats or self._rows(s) is not None]
        if is_moved(node):
            return self._places.numbers_moved(node, {source: self.of(source) for source in sources})
        source = max(sources, key=self._has_row_everywhere)
        if node.target == ALL_GATHER:
            return build(aten.cat.default, [self.of(source)] * args_of(node)[1])
        if node.target == WAIT:
            return self.of(source)
        if is_reduced(node):
            return build(aten.amax.default, self.of(source), *args_of(node)[1:])
        of_each = is_pointwise(node) or node.target == aten.alias.default
        assert of_each, "all else is refused when facts are found"
        return build(aten.expand.default, self.of(source), self._places.shape(node))

    def _all(self, stats: Node) -> Node:
        _, n = self._places.shape(stats)
        return iota(self._places.build, n, torch.int64, self._places.device)

    def _rows(self, node: Node) -> torch.Tensor | None:
        return self._facts[node].rows if node in self._facts else None

    def _has_row_everywhere(self, node: Node) -> bool:
        rows = self._rows(node)
        with unset_fake_temporarily():
            return rows is None or bool((rows != NO_ROW).all())
