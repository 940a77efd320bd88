"""What is made of the same logits as the entries that it meets, where the rounding may say the outcome."""

from __future__ import annotations

from torch.fx import Node

from .. import algebra
from ..graph.walk import reached
from .sides import Side
from .values import Reading, RowValue


def compares_with_own(
    reading: Reading, sides: list[Side], held: list[Node], numbers: list[Node], *, bends: bool
) -> bool:
    """Whether what is held, or numbers that move, are made of the logits of the sides they are compared with.

    Which is the larger, or that they are equal, may be said by the rounding alone then: so their own place of
    the maximum would be none. What only `bends` there has one value. Its slope is the rounding's to say, but
    where all sides and the number move, it is added to an entry's gradient and taken from that of the number
    that is equal to it, if that is the logit, or the logarithm, of the entry.
    """
    if bends and not any(side.detached for side in sides):
        numbers = [n for n in numbers if not _is_of_picks(reading, n)]
    brought, logits = [*held, *numbers], {side.logits.node for side in sides}
    if not brought or not logits:
        return False
    timeline = reading.timeline
    first = min(timeline.position[z] for z in logits)

    def before(node: Node) -> list[Node]:
        return [source for source in timeline.sources(node) if timeline.position[source] >= first]

    made_of = set(reached(brought, before))
    return not logits.isdisjoint(made_of)


def sums_entries(
    reading: Reading, sides: list[Side], numbers: tuple[Node, ...], wide: frozenset[Node]
) -> bool:
    """Whether numbers that move are sums of what entries make, and no statistics of the sides.

    As the sum that probabilities are normalised anew by. Its gradient meets that of the entries when both
    have gone through the softmax, and they cancel there; torch adds them before.
    """
    logits = {side.logits for side in sides}

    def before(node: Node) -> list[Node]:
        value = reading.values.get(node)
        is_statistic = isinstance(value, RowValue) and value.logits in logits
        return [] if is_statistic or node in wide else node.all_input_nodes

    made_of = set(reached(numbers, before))
    return not wide.isdisjoint(made_of)


def _is_of_picks(reading: Reading, node: Node) -> bool:
    """Whether a number is made of picked logits and of normalisers alone, all with their gradients."""
    value = reading.values.get(node)
    if not isinstance(value, RowValue) or value.detached or value.after or value.is_of_several:
        return False
    labels = {*algebra.labels_of(value.expr)}
    return value.expr.free_symbols <= labels | {algebra.LSE, algebra.LSE_EXTENDED}
