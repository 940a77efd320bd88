"""Groups: the values that one `row_stats` serves, and the place where all its tensors read right."""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy
from torch.fx import Node

from .. import algebra
from ..common.compat.graphs import is_dtensor
from ..common.findings import Reason, Refusal
from ..distributed.placements import vocab_dim
from ..graph.shapes import constant, requires_grad, shape_of, tensor_of
from ..graph.timeline import INFERENCE
from ..reading.values import Label, Logits, LossValue, Outside, Reading, RowValue, row_expr
from .rematerialise import earliest

Replaceable = RowValue | LossValue


@dataclass
class Group:
    """Nodes to be computed from one `row_stats` call, which goes before the node at `place`.

    `exprs` has what is to be computed for each, as `expr_of` says before anything is rewritten.
    """

    logits: Logits
    first: int
    last: int
    attached: bool
    place: int
    exprs: dict[Node, sympy.Basic] = field(default_factory=dict)
    labels: dict[sympy.Symbol, Label] = field(default_factory=dict)
    outside: dict[sympy.Symbol, Outside] = field(default_factory=dict)

    @property
    def nodes(self) -> list[Node]:
        return list(self.exprs)

    def exprs_of(self, node: Node) -> tuple[sympy.Expr, ...]:
        """One, or several that stand along an axis."""
        expr = self.exprs[node]
        return tuple(expr) if isinstance(expr, sympy.Tuple) else (expr,)

    @property
    def vocab_size(self) -> int:
        """V as a number. A symbolic V is specialised by this: the kernels are built for one vocabulary."""
        return int(shape_of(self.logits.node)[self.logits.axis])

    @property
    def distributed(self) -> bool:
        """Whether the logits are a DTensor."""
        return is_dtensor(tensor_of(self.logits.node))

    @property
    def sharded(self) -> bool:
        """Whether each rank has some of the vocabulary."""
        return self.distributed and vocab_dim(tensor_of(self.logits.node), self.logits.axis) is not None


def headline(reading: Reading, nodes: list[Node]) -> Node:
    """The node to name a loss by: the first that picks a label."""
    return next((n for n in nodes if algebra.labels_of(expr_of(reading, n))), nodes[0])


def expr_of(reading: Reading, node: Node) -> sympy.Basic:
    """The row expression of a node that may be replaced, or all of them, as a gradient sees it."""
    expr = row_expr(value_of(reading, node))
    return expr if _carries_gradient(reading, node) else algebra.held(expr)


def _carries_gradient(reading: Reading, node: Node) -> bool:
    """Whether a gradient flows through a node to its logits."""
    value = value_of(reading, node)
    wanted = not value.detached and wants_gradient(value.logits)
    return wanted and any(map(_is_differentiable, node.users))


def _is_differentiable(user: Node) -> bool:
    """Whether a gradient may flow through a node: through a comparison none does."""
    example = tensor_of(user)
    return example is None or example.is_floating_point()


def wants_gradient(logits: Logits) -> bool:
    return requires_grad(logits.node)


def value_of(reading: Reading, node: Node) -> Replaceable:
    """The value of a node that may be replaced."""
    value = reading.values[node]
    assert isinstance(value, (RowValue, LossValue))
    return value


EDITED_BETWEEN = Refusal(
    Reason.MUTATED, "The logits or the labels are changed in place between their uses by this loss."
)


def grouped(reading: Reading, logits: Logits, nodes: list[Node]) -> list[Group]:
    """As few groups as in-place edits and changes of the gradient mode allow, each with its place."""
    groups: list[Group] = []
    for node in sorted(nodes, key=reading.timeline.position.__getitem__):
        alone = _alone(reading, logits, node)
        if alone is None:
            reading.miss(node, EDITED_BETWEEN)
        elif not any(_merge(reading, group, alone) for group in groups):
            groups.append(alone)
    return groups


def _alone(reading: Reading, logits: Logits, node: Node) -> Group | None:
    """The group of one node, None where no place sees all its tensors as the node did."""
    timeline, value = reading.timeline, value_of(reading, node)
    position = timeline.position[node]
    names = _names(value)
    labels = {y: held for y, held in reading.labels.get(logits, {}).items() if y in names}
    outside = {q: held for q, held in reading.outside.get(logits, {}).items() if q in names}
    windows = [(0, _first_use(reading, node))]
    windows.append(_logits_window(reading, logits))
    windows += [_label_window(reading, label) for label in labels.values()]
    windows += [_outside_window(reading, held) for held in outside.values()]
    first, last = max(w[0] for w in windows), min(w[1] for w in windows)
    exprs = {node: expr_of(reading, node)}
    group = Group(logits, first, last, not value.detached, position, exprs, labels, outside)
    place = _place(reading, group, position)
    if place is None:
        return None
    group.place = place
    return group


def _names(value: Replaceable) -> set[sympy.Symbol]:
    """The symbols of all labels and outside tensors that a value needs."""
    names = set(row_expr(value).free_symbols)
    if isinstance(value, LossValue):
        names |= {s for s in (value.reduction.y, value.reduction.weight) if s is not None}
    return names


def _place(reading: Reading, group: Group, wanted: int) -> int | None:
    """A place in the window of a group with the gradient mode that it needs, as near `wanted` as can be."""

    def fits(place: int) -> bool:
        mode = reading.timeline.grad_mode(place)
        if group.attached and not group.logits.inference:
            return mode is True
        return (mode == INFERENCE) == group.logits.inference

    wanted = min(max(group.first, wanted), group.last)
    later, earlier = range(wanted, group.last + 1), range(wanted - 1, group.first - 1, -1)
    return next((place for places in (later, earlier) for place in places if fits(place)), None)


def _first_use(reading: Reading, node: Node) -> int:
    position = reading.timeline.position
    return min((position[user] for user in node.users), default=position[node])


def _label_window(reading: Reading, label: Label) -> tuple[int, int]:
    """Where the labels can be had as they read where they are used."""
    timeline = reading.timeline
    if label.node is None:
        return 0, len(timeline.nodes) - 1
    return earliest(reading, label.node, label.position), timeline.window(label.node, label.position)[1]


def _outside_window(reading: Reading, held: Outside) -> tuple[int, int]:
    """The same for a tensor from outside, which may have to be expanded to sizes read off another one."""
    timeline = reading.timeline
    first = earliest(reading, held.node, held.position)
    _, last = timeline.window(held.node, held.position)
    if any(constant(size) is None for size in shape_of(held.like)):
        first = max(first, timeline.position[held.like] + 1)
    return first, last


def _logits_window(reading: Reading, logits: Logits) -> tuple[int, int]:
    """Where the logits read as they did at the version that the loss is of."""
    timeline = reading.timeline
    start = timeline.position[logits.node] + 1
    moments = range(start, len(timeline.nodes))
    moment = next(i for i in moments if timeline.version(logits.node, i) == logits.version)
    return timeline.window(logits.node, moment)


def _reads(group: Group, other: Group) -> bool:
    """Whether a group needs what another one computes, seen through views."""
    held: list[Label | Outside] = [*group.labels.values(), *group.outside.values()]
    return any(tensor.node in other.nodes for tensor in held)


def _merge(reading: Reading, group: Group, other: Group) -> bool:
    """Take `other` into `group` if one place serves both, and neither is made of the other's results."""
    if _reads(other, group) or _reads(group, other):
        return False
    first, last = max(group.first, other.first), min(group.last, other.last)
    if first > last:
        return False
    attached = group.attached or other.attached
    both = Group(group.logits, first, last, attached, group.place, group.exprs | other.exprs)
    place = _place(reading, both, group.place)
    if place is None:
        return False
    group.first, group.last, group.attached, group.place = first, last, attached, place
    group.exprs |= other.exprs
    group.labels |= other.labels
    group.outside |= other.outside
    return True
