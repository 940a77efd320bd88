"""The sides of a divergence, each of which has a linear layer of its own: what is counted, and told."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..graph.shapes import hint, shape_of
from .calls import divergence_call
from .find import Head, source_of_exit
from .kinds import HIDDEN
from .loops import shared_sums
from .no_head import SIDE_WHOLE

TOGETHER = "the logits of all sides are those of the same rows"
NO_SLABS = "a divergence is not summed up from blocks of classes"


def told_of_sides(head: Head) -> str:
    """What is told of the sides of a head; "" where it has no divergence."""
    if head.why_given:
        return f"{SIDE_WHOLE}{head.why_given}"
    return TOGETHER if any(len(divergence_call(node).ms) > 1 for node in head.divergences) else ""


def moving(head: Head) -> list[Node]:
    """The gradients of logits of which others are made: one for each side that moves."""
    return list(dict.fromkeys(source_of_exit(node, head) for node in head.exits))


def numbers_of_sides(head: Head) -> dict[str, Any]:
    """What a plan is made from, of several sides."""
    sums = shared_sums(head)
    hidden = [node for node, kind in head.exits.items() if kind == HIDDEN]
    return {
        "sides": NO_SLABS,
        "d_weights": sum(_width(nodes[0], head) for nodes in sums),
        "d_hidden": sum(hint(shape_of(node)[-1]) for node in hidden),
        "shares": max(map(len, sums), default=1),
    }


def _width(node: Node, head: Head) -> int:
    """The hidden size of a gradient of the weight, [V, D] or transposed."""
    return sum(map(hint, shape_of(node)[-2:])) - int(head.v)
