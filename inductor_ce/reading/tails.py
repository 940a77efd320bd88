"""What adds divergences up after they are summed, as the two directions of R-Drop are: one sweep has both.

Those of other logits, as of the chunks of a loop, stay apart: nothing of the one need wait for the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from ..algebra import divergences as joint
from ..algebra.divergences import Joint
from ..graph.shapes import same_shape, shape_of, tensor_of
from . import spellings
from .constants import number_of
from .losses import modernised
from .values import Reading


@dataclass(frozen=True)
class Summed:
    """A sum over the classes, and maybe over rows.

    Attributes:
        node: what it is the value of.
        end: the step that says how it is summed: the node itself, or one of those that it adds up.
        summand: a node with the shape of what is summed, before rows are chosen.
        axis: of the classes.
        expr: what is summed.
        wide: the nodes by which it was made.
        logits: of its sides.
    """

    node: Node
    end: Node
    summand: Node
    axis: int
    expr: Joint
    wide: frozenset[Node]
    logits: frozenset[Node]


def added_up(reading: Reading, found: list[Summed]) -> Iterator[Summed]:
    """Those that nothing adds up, and what adds up others, in the order of the graph."""
    values = {each.node: each for each in found}
    for node in reading.timeline.nodes if len(found) > 1 else ():
        if node not in values and not values.keys().isdisjoint(node.all_input_nodes):
            made = _combined(reading, values, node)
            if made is not None:
                values[node] = made
    inner = {n for each in values.values() for n in each.wide - {each.node} if n in values}
    tops = [each for node, each in values.items() if node not in inner]
    yield from sorted(tops, key=lambda each: reading.timeline.position[each.node])


def _combined(reading: Reading, values: dict[Node, Summed], node: Node) -> Summed | None:
    """A node that adds up values which nothing else reads, or is one times a number."""
    spelled = spellings.read(node)
    sources = [source for source in node.all_input_nodes if source in values]
    if spelled is None or not _is_plain(reading, node, sources):
        return None
    name, args = spelled[0].name, spelled[1]
    if args.get("alpha", 1) != 1 or args.get("rounding_mode") is not None:
        return None
    left: Any = args.get("input")
    right: Any = args.get("other")
    if name in ("add", "sub") and left in sources and right in sources:
        return _sum(node, values[left], values[right], 1 if name == "add" else -1)
    if name == "neg":
        return _times(node, values[left], -1)
    c = number_of(reading, right if left in sources else left)
    if c is None or (name == "div" and left not in sources):
        return None
    scale = {"add": 1 if c == 0 else 0, "mul": c, "div": 1 / c if c else 0}.get(name, 0)
    return _times(node, values[sources[0]], scale) if scale else None


def _is_plain(reading: Reading, node: Node, sources: list[Node]) -> bool:
    """Whether a node has the shape of values that nothing else reads, and a gradient as they have."""
    timeline = reading.timeline
    alone = all(len(s.users) == 1 and timeline.unchanged(s, s) for s in sources)
    same = tensor_of(node) is not None and all(same_shape(shape_of(node), shape_of(s)) for s in sources)
    modes = {timeline.grad_mode(each) for each in (node, *sources)}
    return alone and same and len(modes) == 1


def _times(node: Node, value: Summed, c: float) -> Summed | None:
    expr = joint.times(value.expr, joint.number(c))
    if expr is None:
        return None
    return replace(value, node=node, expr=expr, wide=value.wide | {value.node, node})


def _sum(node: Node, a: Summed, b: Summed, sign: int) -> Summed | None:
    scaled = joint.times(b.expr, joint.number(sign))
    alike = a.axis == b.axis and same_shape(shape_of(a.summand), shape_of(b.summand))
    if scaled is None or not alike or _reduction(a.end) != _reduction(b.end):
        return None
    if a.logits.isdisjoint(b.logits):
        return None
    wide, logits = a.wide | b.wide | {a.node, b.node, node}, a.logits | b.logits
    return replace(a, node=node, expr=a.expr + scaled, wide=wide, logits=logits)


def _reduction(end: Node) -> tuple[object, ...]:
    """How a sum, a mean or a loss sums."""
    spelled = spellings.read(end)
    assert spelled is not None
    step, args = spelled
    if step.name == "kl_div":
        return step.name, modernised(args).get("reduction", "mean")
    return step.name, args.get("dim"), bool(args.get("keepdim"))
