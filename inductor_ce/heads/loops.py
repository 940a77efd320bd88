"""Loops over chunks that a user writes: heads of one weight, whose gradients the graph adds up.

Each is a head of its own, and would keep a gradient of the whole weight until the backward adds them, and its
logits if they are few. In a loop the chunks go one after another, and add to one sum, unless the weight is
frozen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from ..graph.shapes import shape_of
from ..graph.walk import args_of
from .find import Head
from .kinds import VIEWS, WEIGHT, WEIGHT_T
from .pieces import CAST

aten = torch.ops.aten


@dataclass
class Loop:
    """How far a loop has come.

    Attributes:
        left: heads that are still to be done, the one at hand included.
        out: the sum of the weight's gradient so far.
        after: what is made by then.
    """

    left: int
    out: Node | None = None
    after: list[Node] = field(default_factory=list)

    @property
    def is_last(self) -> bool:
        return self.left == 1


def weight_exits(head: Head) -> list[Node]:
    return [node for node, kind in head.exits.items() if kind in (WEIGHT, WEIGHT_T)]


def shared_sums(head: Head) -> list[list[Node]]:
    """The gradients of weights that a head makes, those together that the graph adds up."""
    sums: dict[Any, list[Node]] = {}
    for node in weight_exits(head):
        key = _summed(node) or node, head.exits[node], str(shape_of(node))
        sums.setdefault(key, []).append(node)
    return [*sums.values()]


def find_loops(heads: Iterable[Head]) -> list[list[Head]]:
    """Heads whose gradients of the weight are added, or of one frozen weight, two or more in each loop."""
    loops: dict[Any, list[Head]] = {}
    for head in heads:
        exits = weight_exits(head)
        if not exits and head.exits:
            loops.setdefault((_root(head.products[0].columns), head.v), []).append(head)
        elif len(exits) == 1 and (found := _summed(exits[0])) is not None:
            loops.setdefault((*found, head.exits[exits[0]], head.v), []).append(head)
    return [loop for loop in loops.values() if len(loop) > 1]


def _root(node: Node) -> Node:
    """What a node is a view or a cast of."""
    while node.target in VIEWS or node.target == CAST:
        node = args_of(node)[0]
    return node


def _summed(node: Node) -> tuple[Node, tuple[Any, ...]] | None:
    """(the sum that a gradient is added to, the views and casts of it that are added)."""
    top, steps = _added(node)
    user = _only_user(top)
    if user is None or not _is_sum(user):
        return None
    while (above := _only_user(user)) is not None and _is_sum(above):
        user = above
    return user, steps


def _added(node: Node) -> tuple[Node, tuple[Any, ...]]:
    """What of a gradient is added, and by which steps it is made of it."""
    steps: list[Any] = []
    while (user := _only_user(node)) is not None and (user.target in VIEWS or user.target == CAST):
        node = user
        steps.append((user.target, str(args_of(user)[1:])))
    return node, tuple(steps)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_sum(node: Node) -> bool:
    is_plain = node.target == aten.add.Tensor and not node.kwargs
    return is_plain and len(set(node.all_input_nodes)) == 2


def leave_to_last(graph: Graph, gradients: list[Node]) -> None:
    """Take all gradients but the last out of the sum, which the last one then is."""
    for gradient in gradients[:-1]:
        top, _ = _added(gradient)
        total = _only_user(top)
        assert total is not None
        (other,) = (source for source in total.all_input_nodes if source is not top)
        total.replace_all_uses_with(other)
        graph.erase_node(total)
