"""Divergences whose entries are set where a probability is 0, as `torch.distributions` does.

    t = p * (log p - log q); t[q == 0] = inf; t[p == 0] = 0; t.sum(-1)

NOTE Probabilities that underflow
A softmax is 0 where the logit is -inf, and there this is what p (log p - log q) has as its limit, which the
operators compute. It is also 0 where a finite logit lies so far below the maximum that the exponential has
no digits left. What is set there is no limit: the divergence is finite, and is given as that.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch.fx import Node

from . import spellings
from .values import Reading


class Zeroed(NamedTuple):
    """The factors of a product, the p and q of which it is set where they are 0, and what sets it."""

    factors: dict[str, Any]
    p: Node
    q: Node
    edits: frozenset[Node]


def set_where_zero(reading: Reading, node: Node) -> Zeroed | None:
    """A product that is edited so before the one node that reads it."""
    position, spelled = reading.timeline.position, spellings.read(node)
    edits = [user for user in node.users if spellings.is_step(user, "edit_setitem")]
    edits.sort(key=position.__getitem__)
    if spelled is None or spelled[0].name != "mul" or len(edits) != 2:
        return None
    sets = [found for edit in edits if (found := _set(node, edit)) is not None]
    if [number for number, _, _ in sets] != [math.inf, 0] or not _is_read_after(node, edits[-1], position):
        return None
    (_, q, by_q), (_, p, by_p) = sets
    return Zeroed(spelled[1], p, q, frozenset({*edits, *by_q, *by_p}))


def _is_read_after(node: Node, last: Node, position: dict[Node, int]) -> bool:
    """Whether all that reads elements of a node, but for its edits, is one node behind the last of them."""
    readers = [
        user
        for user in node.users
        if not spellings.is_step(user, "edit_setitem")
        and not (spellings.is_step(user, "expand") and node not in user.args[:1])
    ]
    return len(readers) == 1 and position[readers[0]] > position[last]


def _set(node: Node, edit: Node) -> tuple[float, Node, list[Node]] | None:
    """The number, the probabilities, and the nodes of `node[probabilities == 0] = number`."""
    args: dict[str, Any] = spellings.arguments(edit, spellings.step_of(edit))  # type: ignore[arg-type]
    made, mask = [], args.get("index")
    while isinstance(mask, Node) and (spelled := spellings.read(mask)) is not None:
        made.append(mask)
        step, inner = spelled
        if step.name == "eq":
            is_zero = isinstance(inner.get("other"), (int, float)) and inner["other"] == 0
            known = is_zero and args["input"] is node and isinstance(args.get("value"), (int, float))
            return (args["value"], inner["input"], made) if known else None
        if step.name != "expand":
            return None
        mask = inner.get("input")
    return None
