"""Entries whose rows were chosen, or moved about: f(softmax(z))[rows] reads as f(softmax(z[rows])).

A function of entries commutes with all that leaves each row together. So what is chosen, or seen by a view,
is read before, and its sides are chosen or seen so.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from .. import algebra
from ..algebra import entries
from ..algebra.entries import Term
from ..graph.shapes import shape_of, tensor_of
from ..graph.timeline import INFERENCE
from . import spellings
from .chosen import chosen_along, chosen_by_index, is_alike
from .context import Context
from .joint import JointReader
from .sides import Side
from .values import VocabValue
from .views import step_back, viewed


def before_move(joint: JointReader, node: Node) -> Node | None:
    """What `node` has some rows of, or the same rows elsewhere."""
    spelled, timeline = spellings.read(node), joint.reading.timeline
    if spelled is None or timeline.grad_mode(node) == INFERENCE:
        return None
    source = spelled[1].get("input")
    if not isinstance(source, Node) or tensor_of(source) is None or not timeline.unchanged(source, source):
        return None
    chooses = spelled[0].name in ("getitem", "index_select", "gather")
    return source if chooses or spelled[0].view is not None else None


_UNREAD = None, None


def moved(
    joint: JointReader, node: Node, source: Node, term: Term | None, axis: int | None
) -> tuple[Term, int] | tuple[None, None]:
    """(a term of the source as one of the node, the axis of its classes), if it is of sides alone."""
    if term is None or axis is None or entries.places_of(term, "t", "n", "c"):
        return _UNREAD
    leaves: dict[Term, Term] = {}
    axes = set()
    for side in entries.sides_of(term):
        value = _value(joint, node, source, joint.sides[side], axis)
        if value is None:
            return _UNREAD
        place = joint.side(Side(value.logits, value.steps, joint.sides[side].detached))
        leaves |= {(name, side): (name, place) for name in entries.OF_SIDES}
        axes.add(value.axis)
    return (entries.replaced(term, leaves), axes.pop()) if len(axes) == 1 else _UNREAD


def _value(joint: JointReader, node: Node, source: Node, side: Side, axis: int) -> VocabValue | None:
    """Of the logits of a side, as they are in the source, those of the node."""
    context = Context(joint.reading, node)
    value = VocabValue(side.logits, side.steps, axis, algebra.LOGITS)
    if viewed(node) is source:
        for place in range(len(shape_of(node))):
            back = step_back(node, source, place)
            if back is not None and back[0] == axis:
                return replace(value, axis=place, steps=value.steps + back[1])
    step, args = spellings.read(node)  # type: ignore[misc]
    if step.name == "getitem":
        return chosen_by_index(context, source, args.get("index"), value)
    if step.name == "index_select" or (step.name == "gather" and is_alike(args.get("index"), axis)):
        return chosen_along(context, source, args.get("dim"), args.get("index"), value)
    return None
