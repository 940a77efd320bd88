"""Divergences whose entries are set where a probability is 0, as `torch.distributions` does.

    t = p * (log p - log q); t[q == 0] = inf; t[p == 0] = 0; t.sum(-1)

Edits are functions by then: a `masked_fill` of another.

NOTE Probabilities that underflow
A softmax is 0 where the logit is -inf, and there this is what p (log p - log q) has as its limit, which the
operators compute. It is also 0 where a finite logit lies so far below the maximum that the exponential has
no digits left. What is set there is no limit: the divergence is finite, and is given as that.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch.fx import Node

from ..graph.timeline import Timeline
from . import spellings


class Zeroed(NamedTuple):
    """The factors of a product, the p and q of which it is set where they are 0, and the nodes between."""

    factors: dict[str, Any]
    p: Node
    q: Node
    made: frozenset[Node]


def set_where_zero(timeline: Timeline, node: Node) -> Zeroed | None:
    """A product that is 0 where p is 0, and infinite where q is 0 and p is not, where gradients are on."""
    by_p, by_q = _set(node, 0), None
    if by_p is not None:
        by_q = _set(by_p[0], math.inf)
    if by_p is None or by_q is None:
        return None
    (inner, p, made), (product, q, also_made) = by_p, by_q
    spelled = spellings.read(product)
    if spelled is None or spelled[0].name != "mul":
        return None
    between = frozenset({inner, product, *made, *also_made})
    on = all(timeline.grad_mode(each) is True for each in (node, *between))
    edited = any(timeline.edits(each) for each in between)
    return Zeroed(spelled[1], p, q, between) if on and not edited else None


def _set(node: Any, number: float) -> tuple[Any, Node, list[Node]] | None:
    """x, the probabilities, and the nodes of the mask of x.masked_fill(probabilities == 0, number)."""
    spelled = spellings.read(node) if isinstance(node, Node) else None
    if spelled is None or spelled[0].name != "masked_fill" or spelled[1].get("value") != number:
        return None
    source, mask, made = spelled[1].get("input"), spelled[1].get("mask"), []
    while isinstance(mask, Node) and isinstance(source, Node) and (read := spellings.read(mask)) is not None:
        made.append(mask)
        step, args = read
        if step.name == "eq":
            is_zero = isinstance(args.get("other"), (int, float)) and args["other"] == 0
            return (source, args["input"], made) if is_zero else None
        if step.name != "expand":
            return None
        mask = args.get("input")
    return None
