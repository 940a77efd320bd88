"""Which labels a condition is of, and which label an index is, read backwards off integers of rows.

    inside = (y >= start) & (y < end)           labels of a span
    (y - start).clamp(0, C - 1)                 a label less where a block begins, for labels of a span

Either may be of a label that was itself computed: every tensor that it may be said of is kept, and what meets
it decides which is meant. Nothing is a condition that does not name its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..algebra.blocks import Reading, Span
from ..graph.shapes import example_of, tensor_of
from ..graph.timeline import Timeline
from . import spellings
from .views import keeps_order, viewed

INDICES = (torch.int32, torch.int64)  # a smaller integer may come round when a number is taken off it


@dataclass(frozen=True)
class Condition:
    """Whether the label is in the span of the tensor that it is said of, or, `negated`, is not."""

    spans: dict[Node, Span]
    negated: bool = False

    def inverted(self) -> Condition:
        """The contrary: of half of all labels it is the other half."""
        others = {y: span.complement() for y, span in self.spans.items()}
        if self.spans and all(others.values()):
            return Condition({y: span for y, span in others.items() if span is not None}, self.negated)
        return Condition(self.spans, not self.negated)

    def both(self, other: Condition) -> Condition | None:
        """Both conditions, where they leave one span: what is left out, such as padding, may be elsewhere."""
        a, b = (other, self) if self.negated else (self, other)
        pairs = {y: (span, b.spans[y]) for y, span in a.spans.items() if y in b.spans}
        if a.negated:
            return None
        if b.negated:
            shared = {y: one for y, (one, left_out) in pairs.items() if not one.meets(left_out)}
        else:
            shared = {y: one.both(span) for y, (one, span) in pairs.items()}
        return Condition(shared) if shared else None


# Each side of a comparison with a number: the labels for which it holds.
_SPANS: dict[str, Callable[[int], Span]] = {
    "ge": lambda n: Span(first=n),
    "gt": lambda n: Span(first=n + 1),
    "lt": lambda n: Span(end=n),
    "le": lambda n: Span(end=n + 1),
}


class LabelRanges:
    """Conditions and indices of a graph, each read once.

    Args:
        timeline: what was written in place since it was made is neither.
    """

    def __init__(self, timeline: Timeline):
        self._timeline = timeline
        self._indices: dict[Node, dict[Node, Reading]] = {}
        self._conditions: dict[Node, Condition | None] = {}

    def _is_as_made(self, node: Node) -> bool:
        return self._timeline.unchanged(node, node)

    # Indices

    def readings(self, node: Any) -> dict[Node, Reading]:
        """The labels that an integer is, and for which of them."""
        example = tensor_of(node)
        if not isinstance(node, Node) or example is None or example.dtype not in INDICES or not example.dim():
            return {}
        if not self._is_as_made(node):
            return {}
        if node not in self._indices:
            self._indices[node] = {node: Reading(), **self._of_source(node)}
        return self._indices[node]

    def _of_source(self, node: Node) -> dict[Node, Reading]:
        spelled = spellings.read(node)
        if spelled is None:
            return {}
        step, args = spelled
        if _is_view(node):
            return self.readings(args["input"])
        function = {
            "sub": self._moved,
            "add": self._moved,
            "clamp": self._clamped,
            "where": self._filled,
            "masked_fill": self._filled,
        }.get(step.name)
        return {} if function is None else function(step.name, args)

    def _moved(self, how: str, args: dict[str, Any]) -> dict[Node, Reading]:
        number = args.get("other")
        if not isinstance(number, int) or args.get("alpha", 1) != 1:
            return {}
        less = number if how == "sub" else -number
        known = self.readings(args.get("input"))
        return {y: each._replace(start=each.start + less) for y, each in known.items()}

    def _clamped(self, _: str, args: dict[str, Any]) -> dict[Node, Reading]:
        low, high = (args.get(name, default) for name, default in (("min", -math.inf), ("max", math.inf)))
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
            return {}
        found = {}
        for y, each in self.readings(args.get("input")).items():
            bounds = each.bounds.both(Span(low, high + 1).moved(each.start))
            if bounds.first < bounds.end:
                found[y] = each._replace(bounds=bounds)
        return found

    def _filled(self, how: str, args: dict[str, Any]) -> dict[Node, Reading]:
        """where(inside, index, 0) and index.masked_fill(~inside, 0)"""
        condition = self.condition(args.get("condition" if how == "where" else "mask"))
        source = args.get("input")
        if condition is None:
            return {}
        if how == "masked_fill":
            condition = condition.inverted()
        elif condition.negated:
            condition, source = condition.inverted(), args.get("other")
        if condition.negated:
            return {}
        return {
            y: each._replace(known=each.known.both(condition.spans[y]))
            for y, each in self.readings(source).items()
            if y in condition.spans
        }

    # Conditions

    def condition(self, node: Any) -> Condition | None:
        """Which labels a boolean, or a number that is 1 or 0, is of."""
        if not isinstance(node, Node) or tensor_of(node) is None or not self._is_as_made(node):
            return None
        if node not in self._conditions:
            self._conditions[node] = self._condition(node)
        return self._conditions[node]

    def _condition(self, node: Node) -> Condition | None:
        spelled = spellings.read(node)
        if spelled is None:
            return None
        step, args = spelled
        if _is_view(node):
            return self.condition(args["input"])
        a, b = args.get("input"), args.get("other")
        if step.name in _SPANS:
            return self._compared(a, _SPANS[step.name](b)) if isinstance(b, int) else None
        if step.name in ("eq", "ne") and isinstance(b, int):
            equal = self._divided(a, b) or self._compared(a, Span(b, b + 1))
            return equal if equal is None or step.name == "eq" else equal.inverted()
        if step.name == "not":
            inner = self.condition(a) if example_of(node).dtype == torch.bool else None
            return None if inner is None else inner.inverted()
        if step.name not in ("and", "or", "mul"):
            return None
        one, other = self.condition(a), self.condition(b)
        if one is None or other is None:
            return None
        if step.name != "or":
            return one.both(other)
        neither = one.inverted().both(other.inverted())
        return None if neither is None else neither.inverted()

    def _compared(self, index: Any, span: Span) -> Condition | None:
        """An index compared: of labels of which it is another number for some, nothing is known."""
        known = self.readings(index)
        spans = {y: span.moved(each.start) for y, each in known.items() if each == Reading(each.start)}
        return Condition(spans) if spans else None

    def _divided(self, quotient: Any, k: int) -> Condition | None:
        """y // C == k"""
        spelled = spellings.read(quotient) if isinstance(quotient, Node) else None
        if spelled is None or not self._is_as_made(quotient):
            return None
        step, args = spelled
        size = args.get("other")
        floors = step.name == "floor_div" or args.get("rounding_mode") == "floor"
        if step.name not in ("div", "floor_div") or not floors or not isinstance(size, int) or size < 1:
            return None
        return self._compared(args.get("input"), Span(k * size, (k + 1) * size))


def _is_view(node: Node) -> bool:
    """Whether a node has the elements of its source in their order, by whatever type they are told."""
    spelled = spellings.read(node)
    if spelled is None or spelled[0].view is None:
        return False
    source = spelled[1].get("input")
    before, after = tensor_of(source), tensor_of(node)
    if before is None or after is None or not isinstance(source, Node) or not keeps_order(node, source):
        return False
    return before.dtype == torch.bool or viewed(node) is source
