"""Tensors that are made twice, by the same operations on the same tensors, as masks of rows often are.

(y == pad).unsqueeze(-1)    where one part of a loss is masked,
y.eq(pad)[:, None]          where another is
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch.fx import Node

from ..graph.shapes import example_of, tensor_of
from ..graph.timeline import Timeline
from . import spellings
from .steps import View
from .views import keeps_order, viewed

# What takes more steps than this is no mask.
MAX_STEPS = 8
# Steps that are what their names say, however they are spelled. Of others the callables are compared.
_BY_NAME = {"eq", "ne", "gt", "ge", "lt", "le", "not", "and", "or"}


class Twins:
    """Which nodes are the same tensor made again: of these the first that was asked for stands for all.

    Those whose memory is written to are none.
    """

    def __init__(self, timeline: Timeline):
        self._timeline = timeline
        self._first: dict[Node, Node] = {}
        self._made: dict[Hashable, Node] = {}

    def of(self, node: Node, steps: int = MAX_STEPS) -> Node:
        """What stands for a node: itself, where it is the first of its kind."""
        if node not in self._first:
            if not steps:
                return node
            key = self._how(node, steps)
            self._first[node] = node if key is None else self._made.setdefault(key, node)
        return self._first[node]

    def _how(self, node: Node, steps: int) -> Hashable:
        """Equal for nodes that are made alike; None for what is compared with no other."""
        spelled, timeline = spellings.read(node), self._timeline
        if spelled is None or tensor_of(node) is None or not spellings.is_repeatable(node):
            return None
        (step, args), example, position = spelled, example_of(node), timeline.position.get(node)
        if position is None or timeline.edits(node):
            return None
        if example.is_floating_point() and timeline.has_autocast(position):
            return None
        like = tuple(map(str, example.shape)), example.dtype, example.device, example.requires_grad
        source = viewed(node)
        if step.view is not View.SAME and source is not None and keeps_order(node, source):
            made: Hashable = "reshape", self._arg(source, position, steps)
        else:
            target = step.name if step.name in _BY_NAME else node.target
            made = target, self._arg(args, position, steps)
        return made, like, timeline.grad_mode(position)

    def _arg(self, arg: Any, position: int, steps: int) -> Hashable:
        if isinstance(arg, Node):
            return self.of(arg, steps - 1), self._timeline.version(arg, position)
        if isinstance(arg, dict):
            return tuple((name, self._arg(each, position, steps)) for name, each in sorted(arg.items()))
        if isinstance(arg, (list, tuple)):
            return tuple(self._arg(each, position, steps) for each in arg)
        if isinstance(arg, slice):
            return "slice", *(self._arg(x, position, steps) for x in (arg.start, arg.stop, arg.step))
        return type(arg), repr(arg) if isinstance(arg, float) else arg  # 0.0 is no -0.0
