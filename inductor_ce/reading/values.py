"""The values that recognition gives to nodes, and what it knows of a graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from .. import algebra
from ..common.findings import Miss, Reason, Refusal, make_miss
from ..graph.shapes import example_of
from ..graph.timeline import Timeline
from .row_views import RowView
from .twins import Twins


@dataclass(frozen=True)
class Logits:
    """The tensor whose rows are z: `node` with the vocabulary on `axis`, as it reads at `version`."""

    node: Node
    axis: int
    version: int
    inference: bool


# What is done to each log-probability before some are picked: a cast, what a node does, a function.
Afterwards = torch.dtype | Node | Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Label:
    """Class indices, read at `position`, arranged as the rows of the logits after `steps`.

    `kept` is an axis of size 1 that stands where the vocabulary was, if there is one; where that axis is
    longer, these are the labels in its `column`, or all `width` of them. Where `wraps` is "negative", -1 is
    the last column; where it is "modulo", V is also the first.

    Without a `node`, the label of all rows is `column`, or that of row i is i if there is none.
    """

    node: Node | None
    steps: tuple[RowView, ...]
    kept: int | None
    position: int
    wraps: str = ""
    column: int | None = None
    width: int = 1


@dataclass(frozen=True)
class Outside:
    """A tensor that is not made of the logits, read at `position`, arranged as they are after `steps`.

    kind     what it is
    scalar   one number
    row      a number for each row, broadcastable to the shape of the rows with `axis` of size 1
    classes  a number for each class, [V]
    columns  a number for each row and class, with the classes on `axis`

    `made` names a function of its elements that is meant in its place: "exp", "xlogx", or, of truth values by
    which somebody chooses, "where" and "where not".
    """

    node: Node
    kind: str
    steps: tuple[RowView, ...]
    axis: int | None
    like: Node
    position: int
    made: str = ""

    @property
    def is_mask(self) -> bool:
        """Whether it is 0 or 1 in each row."""
        return self.made.startswith("where")


@dataclass(frozen=True)
class VocabValue:
    """A node whose `axis` is the vocabulary of `logits`, made by way of the nodes `wide` of that size.

    `after` is what was done to each element since, in order: a dtype that it was rounded to, or a node with
    a function that the algebra does not have. Picking is all that may follow then.
    No gradient flows through it to the logits where it is `detached`.
    """

    logits: Logits
    steps: tuple[RowView, ...]
    axis: int
    expr: algebra.Vocab
    wide: frozenset[Node] = frozenset()
    after: tuple[Afterwards, ...] = ()
    detached: bool = False

    def reduced_to(self, expr: sympy.Expr, kept: int | None = None) -> RowValue:
        """What a reduction over the vocabulary gives."""
        return RowValue(self.logits, self.steps, kept, expr, self.wide, detached=self.detached)


@dataclass(frozen=True)
class RowValue:
    """A node with a number for each row of `logits`; `kept` is the axis of size 1 where V was, if kept.

    Several labels a row make that axis longer: `more` are the expressions that stand behind the first, or
    `width` is its size, where labels of one symbol stand along it.
    """

    logits: Logits
    steps: tuple[RowView, ...]
    kept: int | None
    expr: sympy.Expr
    wide: frozenset[Node] = frozenset()
    after: tuple[Afterwards, ...] = ()
    detached: bool = False
    more: tuple[sympy.Expr, ...] = ()
    width: int = 1

    @property
    def is_of_several(self) -> bool:
        """Whether a row has more numbers than one."""
        return bool(self.more) or self.width > 1

    @property
    def exprs(self) -> tuple[sympy.Expr, ...]:
        """What stands along the axis `kept`, one expression or several."""
        return self.expr, *self.more


@dataclass(frozen=True)
class Reduction:
    """How a row expression is reduced over the rows, all of them or those whose label is not ignored.

    Attributes:
        how: "none", "sum", "mean", or "batchmean", the sum over the size of the first dimension of `batch`.
        y, ignore_index: rows with this label give 0 and do not count in the mean.
        weight: the class weights by which rows count in the mean.
    """

    how: str
    y: sympy.Symbol | None = None
    ignore_index: int = -100
    weight: sympy.Symbol | None = None
    batch: Node | None = None


@dataclass(frozen=True)
class LossValue:
    """A node that is a reduced row expression. Nothing more is taken from it."""

    logits: Logits
    steps: tuple[RowView, ...]
    expr: sympy.Expr
    reduction: Reduction
    wide: frozenset[Node] = frozenset()
    detached: bool = False
    after: tuple[Afterwards, ...] = ()


@dataclass(frozen=True)
class Columns:
    """A node with a vocabulary axis that is made of labels and numbers alone, such as a smoothed target.

    Its labels, and its numbers for each row, are named in `Reading.loose` until it meets logits. `axis` is
    None where all columns of all axes are alike.
    """

    expr: algebra.Vocab
    axis: int | None


OnLogits = VocabValue | RowValue | LossValue
Value = OnLogits | Columns
# What a step makes of its node: None where it is not of the kind, a Refusal where it is and cannot be read.
Outcome = Value | Refusal | None


def is_shift(value: Value) -> bool:
    """Whether a value is the maximum of a row: subtracted from all logits, it changes no loss."""
    return isinstance(value, RowValue) and algebra.is_maximum(value.expr)


def detached(value: OnLogits) -> OnLogits:
    """A value through which no gradient flows. Its maximum is a constant then."""
    if isinstance(value, RowValue) and is_shift(value):
        value = replace(value, expr=algebra.held(value.expr))
    return replace(value, detached=True)


def row_expr(value: RowValue | LossValue) -> sympy.Basic:
    """The expression of a value, or all of them, to look for statistics in."""
    more = value.more if isinstance(value, RowValue) else ()
    return sympy.Tuple(*value.exprs) if more else value.expr  # type: ignore[union-attr]


@dataclass
class Reading:
    """What recognition knows of a graph.

    Attributes:
        timeline: of the graph.
        guards: whether what is compiled is asked for its guards before it is called.
        apart: whether classes that are left out have a weight of 0, and are not taken from a sum over all.
        originals: what nodes are compared with, under `verify`.
        values: of nodes; edits: of tensors that are edited, as a one-hot target is, by their version.
        labels, outside: what symbols stand for in values over some logits; loose: in those that met none yet.
        joined: nodes that put rows of several losses together.
        looked_through: nodes without a value, by way of which others are read.
        chosen: nodes of `added`, by what they are: rows of logits, masks of classes.
        added: what was added to the graph, each with the node that it is for.
        refusals: why steps do not read their node.
        between: of divergences that are left as they were, by each node between: the end, and why.
        misses, small: what is told of losses that are left; of those over few classes.
        refused: the nodes of these.
        taken_back: nodes whose loss takes a class from a sum over all.
        kept: for whom log-probabilities are kept beside a loss, and the nodes that they are.
        results: what nodes were replaced by, and where.
    """

    timeline: Timeline
    guards: bool = False
    apart: bool = False
    originals: set[Node] = field(default_factory=set)
    values: dict[Node, Value] = field(default_factory=dict)
    edits: dict[Node, dict[int, Columns]] = field(default_factory=dict)
    labels: dict[Logits, dict[sympy.Symbol, Label]] = field(default_factory=dict)
    outside: dict[Logits, dict[sympy.Symbol, Outside]] = field(default_factory=dict)
    loose: dict[sympy.Symbol, Label | Outside] = field(default_factory=dict)
    joined: set[Node] = field(default_factory=set)
    looked_through: set[Node] = field(default_factory=set)
    chosen: dict[Hashable, list[Node]] = field(default_factory=dict)
    added: dict[Node, Node] = field(default_factory=dict)
    refusals: dict[Node, Refusal] = field(default_factory=dict)
    between: dict[Node, tuple[Node, Refusal]] = field(default_factory=dict)
    misses: list[Miss] = field(default_factory=list)
    small: list[Miss] = field(default_factory=list)
    refused: set[Node] = field(default_factory=set)
    taken_back: set[Node] = field(default_factory=set)
    kept: dict[Node, tuple[str, frozenset[Node]]] = field(default_factory=dict)
    results: dict[Node, tuple[Node, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.twins = Twins(self.timeline)

    def miss(self, node: Node, refusal: Refusal) -> None:
        """Tell why the loss at `node` is left as it was."""
        self.refused.add(node)
        miss = make_miss(node, refusal.reason, refusal.sentence(node))
        told = self.small if refusal.reason is Reason.SMALL_VOCAB else self.misses
        if not any((m.location, m.reason) == (miss.location, miss.reason) for m in told):
            told.append(miss)

    def has_value(self, node: Node) -> bool:
        """Whether a node has a value, or has had one since it was edited."""
        return node in self.values or node in self.edits

    def has_gradient(self, columns: Columns) -> bool:
        """Whether what is made of labels and numbers has the gradient of a number."""
        held = (self.loose[symbol] for symbol in columns.expr.symbols & self.loose.keys())
        return any(h.node is not None and example_of(h.node).requires_grad for h in held)

    def on_logits(self, node: Any) -> OnLogits | None:
        """The value of a node, if it is made of logits."""
        value = self.values.get(node)
        return None if isinstance(value, Columns) else value

    def brought(self, value: RowValue | LossValue) -> set[Node]:
        """The tensors, other than the logits, that a value needs when it is computed otherwise."""
        labels, outside = self.labels.get(value.logits, {}), self.outside.get(value.logits, {})
        names = row_expr(value).free_symbols
        if isinstance(value, LossValue):
            names = names | {s for s in (value.reduction.y, value.reduction.weight) if s is not None}
        nodes = (held[s].node for held in (labels, outside) for s in names if s in held)
        return {node for node in nodes if node is not None}
