"""Rows of which blocks of columns come one after another: what is known of them while a graph runs.

A graph is read in the order in which it runs, and every storage of numbers of rows has the value that was
written to it last, as in `part_reader`. The logits of a block are whatever a step reads as such. What is
found are uses: places where something else reads what was made of blocks. In a use that may be replaced,
nothing is left that must cancel (`algebra.blocks`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Node

from ..algebra import blocks
from ..algebra.blocks import Reference, Row, Sum
from ..common.compat.graphs import is_plain_tensor
from ..graph.shapes import constant, example_of, same_shape, shape_of, tensor_of
from ..graph.timeline import Timeline, written_by
from . import spellings
from .label_ranges import LabelRanges
from .steps import Step as Spelling
from .steps import View
from .views import viewed


@dataclass(frozen=True)
class Wide:
    """The logits of a block and a number for each row; `exp`: e to their power; `held`: have no gradient."""

    block: Node
    shift: Sum = blocks.ZERO
    exp: bool = False
    held: bool = False


@dataclass(frozen=True)
class Stack:
    """Several numbers of each row, along a dimension that is theirs."""

    rows: tuple[Row, ...]
    dim: int

    @property
    def blocks(self) -> frozenset[Node]:
        return frozenset().union(*(row.blocks for row in self.rows))

    @property
    def names(self) -> frozenset[Any]:
        return frozenset().union(*(row.names for row in self.rows))


@dataclass(frozen=True)
class Use:
    """A node that reads `source` and is no step; `row` is what it reads, None if it may not be replaced."""

    user: Node
    source: Node
    row: Sum | None
    blocks: frozenset[Node]


@dataclass
class Blocks:
    """What was read of a graph: its uses, and its steps with the blocks that they are of."""

    uses: list[Use] = field(default_factory=list)
    steps: dict[Node, frozenset[Node]] = field(default_factory=dict)


Args = dict[str, Any]
Step = Callable[["BlockReader", Node, Spelling, Args], Row | Stack | Wide | None]


class BlockReader:
    """What storages hold while a graph runs.

    Args:
        timeline: of the graph.
        steps: what reads a step, by its name in the table of steps.
    """

    def __init__(self, timeline: Timeline, steps: Mapping[str, Step]):
        self.timeline, self.labels, self._steps = timeline, LabelRanges(timeline), steps
        self.found = Blocks()
        self._rows: dict[Hashable, Row | Stack | None] = {}  # by storage; None: something else wrote there
        self._blocks_of: dict[Hashable, frozenset[Node]] = {}  # all that a storage has had
        self._whole: set[Node] = set()
        self._views: set[Node] = set()  # of what is settled, where nobody writes to it any more
        self.logits: dict[Node, Wide] = {}
        self.firsts: dict[Node, Row] = {}  # by max(dim), its values
        self._references: dict[Hashable, Reference] = {}
        self._attached: set[Reference] = set()  # of these, those that have a gradient
        self._outside = {timeline.storage(n) for n in timeline.nodes if n.op in ("placeholder", "get_attr")}

    # Values

    def row(self, given: Any) -> Row | None:
        """What has a number for each row, or the same for all."""
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            return Sum(number=given)
        if not isinstance(given, Node) or given not in self._whole:
            return None
        value = self._rows.get(self.timeline.storage(given))
        return None if isinstance(value, Stack) else value

    def stack(self, given: Any) -> Stack | None:
        """Numbers of each row that stand beside each other."""
        is_whole = isinstance(given, Node) and given in self._whole
        value = self._rows.get(self.timeline.storage(given)) if is_whole else None
        return value if isinstance(value, Stack) else None

    def wide(self, given: Any) -> Wide | None:
        """Logits of a block, which any tensor that has columns is for whoever reads it as such."""
        if given in self.logits:
            return self.logits[given]
        example = tensor_of(given)
        if example is None or not example.is_floating_point() or example.dim() < 2:
            return None
        if given in self._whole or (constant(example.shape[-1]) or 0) < 2 or not is_plain_tensor(example):
            return None
        copied = copied_from(given)
        if copied is None:
            return Wide(given)
        inner = self.wide(copied)
        held = spellings.is_step(given, "detach")
        return None if inner is None else replace(inner, held=inner.held or held)

    def take(self, node: Node, wide: Wide) -> None:
        """Note that a step reads logits: that is what they are, and so are those that they are a copy of."""
        if node in self.logits:
            return
        self.logits[node] = wide
        copied = copied_from(node)
        if copied is not None:
            self.found.steps[node] = frozenset({wide.block})
            self.take(copied, replace(wide, held=False))

    def reference(self, node: Node, *key: Hashable, of: frozenset[Node]) -> Sum:
        """A number that must cancel; one that has a gradient is not one that has none."""
        key = (example_of(node).requires_grad, *key)
        found = self._references.setdefault(key, Reference(len(self._references), of))
        if key[0]:
            self._attached.add(found)
        return blocks.name(found)

    def read(self, node: Node) -> None:
        """Take in the next node of the graph: what it writes or makes, or else whom it needs."""
        if node.op in ("call_function", "call_method"):
            value = self._value_of(node)
            if value is not None and self._put(node, value):
                return
            if node in self.firsts:
                return
        self._use(node)

    def _put(self, node: Node, value: Row | Stack | Wide) -> bool:
        if tensor_of(node) is None and not any(written_by(node)):
            return False
        if isinstance(value, Wide):
            self.logits[node] = value
            self.found.steps[node] = frozenset({value.block})
            return not any(written_by(node))
        storages = {self.timeline.storage(written) for written in written_by(node)}
        if storages & self._outside or not storages <= self._rows.keys() or self._loses_gradient(node, value):
            return False
        if tensor_of(node) is not None:
            storages.add(self.timeline.storage(node))
            self._whole.add(node)
        for storage in storages:
            self._rows[storage] = value
            self._blocks_of[storage] = self._blocks_of.get(storage, frozenset()) | value.blocks
        self.found.steps[node] = value.blocks
        return True

    def _loses_gradient(self, node: Node, value: Row | Stack) -> bool:
        """Whether a node is made where no gradient is taken, of what has one."""
        example = tensor_of(node)
        if example is None or example.requires_grad:
            return False
        return any(self._has_gradient(each) for each in value.names)

    def _has_gradient(self, what: Any) -> bool:
        if isinstance(what, Reference):
            return what in self._attached
        return any(example_of(block).requires_grad for block in what.blocks)

    # Uses

    def _use(self, node: Node) -> None:
        step = spellings.step_of(node)
        if step is not None and step.reads_shapes:
            return
        written = {self.timeline.storage(n) for n in written_by(node)}
        for source in node.all_input_nodes:
            if source in self.firsts and node.users:
                self.found.uses.append(Use(node, source, None, self.firsts[source].blocks))
            elif source in self._views and self.timeline.shares_storage(node, source):
                self._views.add(node)
            elif source not in self._views and source not in self.logits:
                self._use_of(source, node, written)
        for storage in written & self._rows.keys():
            self._rows[storage] = None

    def _use_of(self, source: Node, node: Node, written: set[Hashable]) -> None:
        storage = self.timeline.storage(source)
        of = self._blocks_of.get(storage, frozenset())
        if not of:
            return
        row = self.row(source)
        settled = row if isinstance(row, Sum) and row.is_settled and storage not in written else None
        self.found.uses.append(Use(node, source, settled, of))
        still = self.timeline.unchanged(source, node)
        if settled is not None and still and self.timeline.shares_storage(node, source):
            self._views.add(node)

    def read_exposed(self) -> None:
        """Who else reads what has columns."""
        for node, wide in self.logits.items():
            for user in node.users:
                if user not in self.found.steps and not _asks_no_element(user):
                    self.found.uses.append(Use(user, node, None, frozenset({wide.block})))

    # Steps

    def _value_of(self, node: Node) -> Row | Stack | Wide | None:
        spelled = spellings.read(node)
        if spelled is None:
            return self._copied(node)
        step, args = spelled
        function = self._steps.get(step.name)
        return None if function is None else function(self, node, step, args)

    def _copied(self, node: Node) -> Row | None:
        """x.copy_(y)"""
        if node.target != "copy_" or node.kwargs or len(node.args) != 2:
            return None
        target, source = node.args
        if self.row(target) is None or not same_shape(shape_of(target), shape_of(source)):  # type: ignore[arg-type]
            return None
        return self.row(source)

    def pair(self, node: Node, a: Any, b: Any) -> tuple[Row, Row] | None:
        """Two numbers of each row, of which that row of a result is made."""
        one, other = self.row(a), self.row(b)
        return (one, other) if one is not None and other is not None and self.alike(node, a, b) else None

    def alike(self, node: Node, *given: Any) -> bool:
        """Whether each row of a result is made of that row of what is given, or of a number for all."""
        for each in given:
            row = self.row(each)
            if not isinstance(each, Node) or (isinstance(row, Sum) and not row.terms):
                continue
            if tensor_of(each) is None or not same_shape(shape_of(each), shape_written(node)):
                return False
        return True


def copied_from(node: Any) -> Node | None:
    """What a node is, to the bit: without its gradient, or cast to a type that loses nothing."""
    spelled = spellings.read(node) if isinstance(node, Node) else None
    if spelled is None or not (spelled[0].name == "detach" or spelled[0].view is View.SAME):
        return None
    source = spelled[1].get("input")
    return source if spelled[0].name == "detach" or viewed(node) is source else None


def shape_written(node: Node) -> Any:
    return shape_of(node if tensor_of(node) is not None else node.all_input_nodes[0])


def _asks_no_element(node: Node) -> bool:
    step = spellings.step_of(node)
    if step is not None and step.reads_shapes:
        return True
    return step is not None and step.name in ("getitem", "select") and all(map(_asks_no_element, node.users))
