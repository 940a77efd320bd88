"""Make again, at an earlier place, what a loss reads but the user computes only later.

Dynamo emits a view, a mask or a cast of labels and weights where the user's code first names it, which may
be after the place where statistics are due. Such nodes are cheap and read little: they are made again from
what stood earlier, and AOTAutograd finds the twin.
"""

from __future__ import annotations

from torch.fx import Node

from ..graph.builder import Builder
from ..graph.timeline import written_by
from ..reading import spellings
from ..reading.values import LossValue, Reading, RowValue

# What takes more steps than this is no view or mask.
MAX_STEPS = 8


def earliest(reading: Reading, node: Node, position: int, steps: int = MAX_STEPS) -> int:
    """The first place where `node` can be had as it reads at `position`, made again if need be."""
    timeline = reading.timeline
    first, _ = timeline.window(node, position)
    if not steps or not _can_be_made_again(reading, node, position):
        return first
    at = timeline.position[node]
    sources = [earliest(reading, source, at, steps - 1) for source in node.all_input_nodes]
    return min(first, max([timeline.calm_since(at), *sources]))


def _can_be_made_again(reading: Reading, node: Node, position: int) -> bool:
    if not spellings.is_repeatable(node) or any(written_by(node)):
        return False
    is_read = isinstance(reading.values.get(node), (RowValue, LossValue))
    may_be_replaced = is_read or node in reading.looked_through
    return not may_be_replaced and reading.timeline.unchanged(node, node, position)


def made_before(build: Builder, reading: Reading, node: Node, place: int) -> Node:
    """`node`, by what took its place, or made again where it comes only after `place`."""
    if node not in reading.timeline.position:  # a view has been given what took the place of its source
        node = next(each for each, (result, _) in reading.results.items() if result is node)
    result, ready = reading.results.get(node, (node, 0))
    if reading.timeline.position[node] < place:
        return result if ready <= place else node
    return build.again(node, {s: made_before(build, reading, s, place) for s in node.all_input_nodes})
