"""Views of lazy logits that a compiled function was given, and returns: taken of them when its graph has run.

In the graph such logits are made anew of their parts, and a view of these is in other memory: an edit of one
would not be seen in the other. So the views leave the graph. What takes them of the lazy logits, a few steps
such as `z[:, -1]` or `z.view(-1, V)`, is done outside, by a program of its own: what can stay lazy does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..common.compat.graphs import is_higher_order, set_grad_enabled, tree_leaves
from ..common.findings import name_of
from ..graph.timeline import Timeline, written_by
from .lazy_logits import LazyLogits
from .lazy_trees import memory_of

# What changes in place how a tensor is looked at, so that its node stands for another view from there on.
_TURN = {
    *("unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "as_strided_", "resize_"),
    *("resize_as_", "set_", "detach_", "requires_grad_", "__set__"),
}


class Views:
    """Those results of a graph, and the program that takes them.

    Args:
        timeline: of the graph.
        results: the nodes of these results, by their place among all.
        search: what the program consists of.
    """

    def __init__(self, timeline: Timeline, results: dict[int, Node], search: _Search) -> None:
        inputs = [node for node in timeline.nodes if node.op == "placeholder"]
        self.arguments = tuple(inputs.index(node) for node in search.given)
        self._others = list(search.others)  # what the program reads too: these become results of the graph
        self._steps = [node for node in timeline.nodes if node in search.steps]
        self.places, self.count = tuple(results), 0
        graph = Graph()
        twins = {node: graph.placeholder(node.name) for node in (*search.given, *search.others)}
        for node in timeline.nodes:
            if node in search.steps:
                graph.call_function(set_grad_enabled, (timeline.grad_mode(node) is True,))
                args, kwargs = map_arg((node.args, node.kwargs), lambda n: twins[search.same(n)])
                twins[node] = graph.create_node(node.op, node.target, args, kwargs)
        graph.output(tuple(twins[search.same(node)] for node in results.values()))
        self._program = GraphModule(nn.Module(), graph)

    def leave(self, graph: Graph, twins: dict[Node, Node], became: Sequence[Node]) -> None:
        """Let a copy of the graph return what edited inputs `became`, and what is read, but no views."""
        output = graph.output_node()
        results: Any = output.args[0]
        kept = [result for i, result in enumerate(results) if i not in self.places]
        output.args = ((*kept, *became, *(twins[node] for node in self._others)),)
        self.count = len(self._others)
        for node in reversed(self._steps):
            if not twins[node].users:
                graph.erase_node(twins[node])

    def taken(self, arguments: Sequence[Any], results: Sequence[Any], others: Sequence[Any]) -> Sequence[Any]:
        """All results of the function: `results`, which are not views, and the views."""
        if not self.places:
            return results
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            views = self._program(*(arguments[i] for i in self.arguments), *others)
        made = dict(zip(self.places, views, strict=True))
        rest = iter(results)
        return tuple(made[i] if i in made else next(rest) for i in range(len(results) + len(made)))


def views_of(timeline: Timeline, lazy: Sequence[Node]) -> tuple[Views, set[Node]]:
    """What a graph returns in the memory of lazy inputs.

    Returns the views of some of the inputs, and the other inputs, of which it returns something that no
    program takes, as what a function of the user's own gives.
    """
    results: Any = timeline.nodes[-1].args[0]
    homes = {place_of(node.meta["example_value"]): node for node in lazy} if lazy else {}
    found = {
        i: homes[place]
        for i, node in enumerate(results)
        if isinstance(node, Node) and (place := place_of(node.meta.get("example_value"))) in homes
    }
    lost: set[Node] = set()
    while True:  # as long as an input is lost of which others are views
        search = _Search(node for node in lazy if node not in lost)
        views = {i: results[i] for i, home in found.items() if home not in lost}
        fresh = {found[i] for i, node in views.items() if not search.takes(node)}
        if not fresh:
            return Views(timeline, views, search), lost
        lost |= fresh


class _Search:
    """How views of lazy inputs are taken: of what is given, of other tensors and sizes, by steps."""

    def __init__(self, lazy: Iterable[Node]) -> None:
        self._homes = {place_of(node.meta["example_value"]) for node in lazy}
        self.given: dict[Node, None] = {}
        self.others: dict[Node, None] = {}
        self.steps: set[Node] = set()
        self._same: dict[Node, Node] = {}

    def same(self, node: Node) -> Node:
        """The node that gives the tensor which a node edits in place, and gives again."""
        while node in self._same:
            node = self._same[node]
        return node

    def takes(self, node: Node) -> bool:
        """Whether a node is such a view, or read by one; then it is taken in."""
        if node in self.steps or node in self.given or node in self.others or node in self._same:
            return True
        example = node.meta.get("example_value")
        if not any(place_of(leaf) in self._homes for leaf in tree_leaves(example)):
            self.others[node] = None
            return isinstance(example, (int, torch.SymInt, Tensor)) and not isinstance(example, LazyLogits)
        if _is_turned(node):
            return False
        if node.op == "placeholder":
            self.given[node] = None
            return True
        if node.op not in ("call_function", "call_method") or is_higher_order(node.target):
            return False
        written = list(written_by(node))
        if written:
            self._same[node] = written[0]
            return len(written) == 1 and self.takes(written[0])
        self.steps.add(node)
        return all(map(self.takes, node.all_input_nodes))


def _is_turned(node: Node) -> bool:
    return any(name_of(each) in _TURN and node in written_by(each) for each in (node, *node.users))


def place_of(example: Any) -> Any:
    """What tells the memory of an example from that of others; None where it has none."""
    if isinstance(example, LazyLogits):
        return example.place
    return memory_of(example) if isinstance(example, Tensor) else None
