"""The values that recognition gives to nodes, and the questions that it may ask about a node's arguments."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from . import algebra
from .rows import Step, arrangement
from .sites import Miss, Reason, make_miss
from .timeline import Mode, Timeline, tensor_of, written_by
from .views import keeps_order, step_back, viewed


@dataclass(frozen=True)
class Logits:
    """The tensor whose rows are z: `node` with the vocabulary on `axis`, as it reads at `version`."""

    node: Node
    axis: int
    version: int
    grad_mode: Mode


@dataclass(frozen=True)
class Label:
    """Class indices, read at `position`, arranged as the rows of the logits after `steps`.

    `kept` is an axis of size 1 that stands where the vocabulary was, if there is one. `base` is the tensor
    that `node` is a view or a copy of, from which it can be made again at an earlier place.
    """

    node: Node
    base: Node
    steps: tuple[Step, ...]
    kept: int | None
    position: int


@dataclass(frozen=True)
class VocabValue:
    """A node whose `axis` is the vocabulary of `logits`, made by way of the nodes `wide` of that size.

    `rounded` is the dtype that it was rounded to on the way. Picking is all that may follow then.
    """

    logits: Logits
    steps: tuple[Step, ...]
    axis: int
    expr: algebra.Vocab
    wide: frozenset[Node] = frozenset()
    rounded: torch.dtype | None = None


@dataclass(frozen=True)
class RowValue:
    """A node with a number for each row of `logits`; `kept` is the axis of size 1 where V was, if kept."""

    logits: Logits
    steps: tuple[Step, ...]
    kept: int | None
    expr: sympy.Expr
    wide: frozenset[Node] = frozenset()
    rounded: torch.dtype | None = None


@dataclass(frozen=True)
class Masked:
    """How F.cross_entropy and F.nll_loss reduce a row expression: over rows whose label is not ignored."""

    y: sympy.Symbol
    ignore_index: int
    reduction: str


@dataclass(frozen=True)
class LossValue:
    """A node that is a reduced row expression. Nothing more is taken from it."""

    logits: Logits
    steps: tuple[Step, ...]
    expr: sympy.Expr
    masked: Masked
    wide: frozenset[Node] = frozenset()


Value = VocabValue | RowValue | LossValue


def is_shift(value: Value) -> bool:
    """Whether a value is the maximum of a row: subtracted from all logits, it changes no loss."""
    return isinstance(value, RowValue) and bool((value.expr - algebra.MAX).is_number)


@dataclass
class Reading:
    """What recognition knows of a graph."""

    timeline: Timeline
    values: dict[Node, Value] = field(default_factory=dict)
    labels: dict[Logits, dict[sympy.Symbol, Label]] = field(default_factory=dict)
    misses: list[Miss] = field(default_factory=list)
    refused: set[Node] = field(default_factory=set)

    def miss(self, node: Node, reason: Reason, fact: str) -> None:
        """Tell why the loss at `node` is left as it was."""
        self.refused.add(node)
        miss = make_miss(node, reason, fact)
        if not any((m.location, m.reason) == (miss.location, miss.reason) for m in self.misses):
            self.misses.append(miss)


@dataclass(frozen=True)
class Place:
    """One node, and the questions its step may ask about its arguments."""

    reading: Reading
    node: Node

    @property
    def position(self) -> int:
        return self.reading.timeline.position[self.node]

    @property
    def grad_mode(self) -> Mode:
        return self.reading.timeline.grad_mode(self.position)

    def known(self, arg: Any) -> Value | None:
        """The value of an argument, unless its storage changed since it was computed."""
        value = self.reading.values.get(arg) if isinstance(arg, Node) else None
        if value is None or not self.reading.timeline.unchanged(arg, arg, self.position):
            return None
        if is_shift(value):  # has no gradient to lose
            return replace(value, logits=replace(value.logits, grad_mode=self.grad_mode))
        return value if value.logits.grad_mode == self.grad_mode else None

    def vocab(self, arg: Any, dim: Any) -> VocabValue | None:
        """`arg` with the vocabulary on `dim`: as known, or as logits, seen through views and casts."""
        example = tensor_of(arg)
        if (
            example is None
            or not isinstance(dim, int)
            or not example.dim()
            or not example.is_floating_point()
        ):
            return None
        axis = dim % example.dim() if -example.dim() <= dim < example.dim() else None
        return None if axis is None else self._seen(arg, axis)

    def _seen(self, arg: Node, axis: int) -> VocabValue:
        value = self.known(arg)
        if isinstance(value, VocabValue) and value.axis == axis:
            return value
        here = self.opaque(arg, axis)
        if isinstance(value, VocabValue):
            return here
        through = self._through(arg, axis)
        if through is None:
            return here
        source, source_axis, steps = through
        inner = self._seen(source, source_axis)
        return replace(inner, steps=inner.steps + steps, axis=axis)

    def _through(self, arg: Node, axis: int) -> tuple[Node, int, tuple[Step, ...]] | None:
        """(source, its axis, steps) where `arg` is a view or a cast of `source` and still reads so."""
        timeline = self.reading.timeline
        if timeline.grad_mode(timeline.position[arg]) != self.grad_mode:
            return None
        written = next(written_by(arg), None)
        if written is not None:  # z.div_(t) is z itself
            return (written, axis, ()) if timeline.shares_storage(arg, written) else None
        source = viewed(arg)
        if source is None or not self._still_alike(arg, source):
            return None
        stepped = step_back(arg, source, axis)
        return None if stepped is None else (source, *stepped)

    def _still_alike(self, arg: Node, source: Node) -> bool:
        """Whether a view or copy of `source` still holds what `source` holds."""
        timeline = self.reading.timeline
        return timeline.shares_storage(arg, source) or (
            timeline.unchanged(arg, arg, self.position) and timeline.unchanged(source, arg, self.position)
        )

    def label(
        self, logits: Logits, steps: tuple[Step, ...], node: Node, kept: int | None = None
    ) -> sympy.Symbol:
        """The symbol of a label tensor over some logits; the same labels, however viewed, share one."""
        known = self.reading.labels.setdefault(logits, {})
        mine = self._origin(node)
        for symbol, label in known.items():
            theirs = Place(self.reading, self.reading.timeline.nodes[label.position])._origin(label.node)
            if mine == theirs and arrangement(label.steps) == arrangement(steps):
                return symbol
        symbol = algebra.label("y" if not known else f"y{len(known) + 1}")
        known[symbol] = Label(node, self._base(node), steps, kept, self.position)
        return symbol

    def _base(self, node: Node) -> Node:
        while (source := viewed(node)) is not None and self._still_alike(node, source):
            if node.all_input_nodes != [source]:
                break
            node = source
        return node

    def _origin(self, node: Node) -> tuple[Node, int]:
        """The tensor that `node` is a reshape or an integer cast of, and its version here."""
        while (source := viewed(node)) is not None:
            if not keeps_order(node, source) or not self._still_alike(node, source):
                break
            node = source
        return node, self.reading.timeline.version(node, self.position)

    def is_edited_view(self, source: Node) -> bool:
        """Whether this node is a view of `source` and either is written later, for the other to see."""
        timeline = self.reading.timeline
        edited = not timeline.unchanged(self.node, self.node, len(timeline.nodes))
        return edited and timeline.shares_storage(self.node, source)

    def opaque(self, arg: Node, axis: int) -> VocabValue:
        """`arg` as logits in its own right, whatever it was made from."""
        version = self.reading.timeline.version(arg, self.position)
        return VocabValue(Logits(arg, axis, version, self.grad_mode), (), axis, algebra.LOGITS)

    def miss(self, reason: Reason, fact: str) -> None:
        self.reading.miss(self.node, reason, fact)
