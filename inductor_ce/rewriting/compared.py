"""What is compared with the entries of its own row, to the bit.

NOTE Ranks of labels
(p > p_y).sum() counts the classes above the label. The p_y of ours is the exponential of another difference
than the user's softmax takes, so it may lie a digit below its own entry, which would then be above it. Where
what it is compared with stays, the user's own p_y does.
"""

from __future__ import annotations

from torch.fx import Node

from .. import algebra
from ..graph.shapes import tensor_of
from ..reading import spellings
from ..reading.values import Logits, LossValue, Reading, RowValue, VocabValue, row_expr
from .groups import value_of


def reads_as_written(reading: Reading, user: Node, node: Node, logits: Logits) -> bool:
    """Whether a user of what a loss has of each row puts it beside entries of the rows, which stay."""
    value = reading.values.get(user)
    if isinstance(value, VocabValue):
        return value.logits == logits and algebra.weighs_logits(row_expr(value_of(reading, node)))
    example = tensor_of(node)
    compares = _compares(user) or (value is None and user.users and all(map(_compares, user.users)))
    if not compares or example is None or not example.is_floating_point():
        return False
    return any(_has_entries(reading, other, logits) for other in user.all_input_nodes if other is not node)


def _compares(node: Node) -> bool:
    step = spellings.step_of(node)
    return step is not None and step.compares


def _has_entries(reading: Reading, node: Node, logits: Logits) -> bool:
    """Whether a node is made of the logits, but not by way of what a loss has of each row."""
    timeline = reading.timeline
    first = timeline.position[logits.node]
    frontier, seen = [node], {node}
    while frontier:
        made = frontier.pop()
        if made is logits.node:
            return True
        known = isinstance(reading.values.get(made), (RowValue, LossValue))
        if not known and made in timeline.position:
            later = [s for s in timeline.sources(made) if timeline.position.get(s, -1) >= first]
            new = [source for source in later if source not in seen]
            frontier += new
            seen.update(new)
    return False
