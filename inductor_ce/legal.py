"""Legality: which of the values that recognition read may be replaced, where, and why not the rest."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node

from . import algebra
from .compat import is_dtensor, is_function_body, is_function_transform, is_kept_dynamic, is_plain_tensor
from .config import Options
from .hoist import earliest
from .placements import beside_fact, layout_fact, vocab_dim
from .reading import Columns, Label, Logits, LossValue, Outside, Reading, RowValue, row_expr
from .rows import Permute, Slice, Step, constant, hint, shape_of
from .sites import Reason
from .timeline import INFERENCE, tensor_of
from .unread import escape_fact, needed_nodes, tell_unread

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

TRANSFORMED = (Reason.FUNCTION_TRANSFORM, "The graph runs under a transform of torch.func, such as vmap.")
OWN_BACKWARD = (Reason.OWN_BACKWARD, "The loss is inside an autograd.Function, whose backward is its own.")

Replaceable = RowValue | LossValue


@dataclass
class Group:
    """Nodes to be computed from one `row_stats` call, which goes before the node at `place`."""

    logits: Logits
    first: int
    last: int
    attached: bool
    place: int
    nodes: list[Node] = field(default_factory=list)
    labels: dict[sympy.Symbol, Label] = field(default_factory=dict)
    outside: dict[sympy.Symbol, Outside] = field(default_factory=dict)

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


def judge(reading: Reading, options: Options) -> list[Group]:
    """Decide from graph structure, global shapes and options alone, so that all ranks decide alike."""
    groups: list[Group] = []
    everywhere = _refusal_of_graph(reading)
    for logits, nodes in _losses(reading).items():
        refusal = everywhere or _refusal(logits, options)
        if refusal is not None:
            reading.miss(headline(reading, nodes), *refusal)
            continue
        allowed = _without_escapes(reading, nodes)
        if _is_loss(reading, allowed):
            groups += _grouped(reading, logits, allowed)
    replaced = {node for group in groups for node in group.nodes}
    tell_unread(reading, replaced, options.min_vocab, everywhere)
    return sorted(groups, key=lambda group: group.place)


# What is a loss


def _losses(reading: Reading) -> dict[Logits, list[Node]]:
    """For each logits with a loss on them, the nodes where the algebra ends and the user's own rows begin."""
    ends: dict[Logits, list[Node]] = defaultdict(list)
    for node, value in reading.values.items():
        if isinstance(value, LossValue) or (isinstance(value, RowValue) and _is_end(reading, node, value)):
            ends[value.logits].append(node)
    return {logits: nodes for logits, nodes in ends.items() if _is_loss(reading, nodes)}


def _is_end(reading: Reading, node: Node, value: RowValue) -> bool:
    # Where the maximum does not cancel, the user's own node is as good as ours, and has its gradient.
    gradient = _wants_gradient(value.logits) and not value.detached
    if row_expr(value).has(algebra.MAX) and gradient and any(map(_differentiable, node.users)):
        return False
    return any(
        _is_strange(reading, user, value.logits) or _is_label_of(reading, node, user) for user in node.users
    )


def _is_label_of(reading: Reading, node: Node, user: Node) -> bool:
    value = reading.values.get(user)
    return isinstance(value, (RowValue, LossValue)) and node in reading.brought(value)


def _differentiable(user: Node) -> bool:
    """Whether a gradient may flow through a node: through a comparison none does."""
    example = tensor_of(user)
    return example is None or example.is_floating_point()


def _wants_gradient(logits: Logits) -> bool:
    example = tensor_of(logits.node)
    return example is not None and example.requires_grad


def _is_strange(reading: Reading, user: Node, logits: Logits) -> bool:
    """Whether a user is not of these logits, nor what joins rows of them to others."""
    value = reading.values.get(user)
    return (
        value is None or isinstance(value, Columns) or (value.logits != logits and user not in reading.joined)
    )


def _is_loss(reading: Reading, nodes: list[Node]) -> bool:
    """A loss weighs the normaliser of a row against some of its logits."""
    exprs = [expr_of(reading, node) for node in nodes]
    return any(map(algebra.is_normalised, exprs)) and any(map(algebra.weighs_logits, exprs))


def expr_of(reading: Reading, node: Node) -> sympy.Basic:
    """The row expression of a node that may be replaced."""
    return row_expr(value_of(reading, node))


def value_of(reading: Reading, node: Node) -> Replaceable:
    """The value of a node that may be replaced."""
    value = reading.values[node]
    assert isinstance(value, (RowValue, LossValue))
    return value


def headline(reading: Reading, nodes: list[Node]) -> Node:
    """The node to name a loss by: the first that picks a label."""
    return next((n for n in nodes if algebra.labels_of(expr_of(reading, n))), nodes[0])


# May it be replaced


def _refusal_of_graph(reading: Reading) -> tuple[Reason, str] | None:
    if any(is_function_transform(node.target) for node in reading.timeline.nodes):
        return TRANSFORMED
    return OWN_BACKWARD if is_function_body(reading.timeline.nodes) else None


def _refusal(logits: Logits, options: Options) -> tuple[Reason, str] | None:
    example = tensor_of(logits.node)
    assert example is not None
    if is_dtensor(example):
        fact = layout_fact(example, logits.axis)
        if fact is not None:
            return Reason.PLACEMENTS, fact
    elif not is_plain_tensor(example):
        return Reason.UNSUPPORTED_TENSOR, f"The logits are a {type(example).__name__}, not a plain tensor."
    if example.dtype not in DTYPES:
        return Reason.UNSUPPORTED_DTYPE, f"The logits are {example.dtype}."
    size = shape_of(logits.node)[logits.axis]
    if hint(size) < options.min_vocab:
        return Reason.SMALL_VOCAB, f"The vocabulary of {hint(size)} is below min_vocab={options.min_vocab}."
    if not isinstance(size, int) and is_kept_dynamic(size):
        return Reason.DYNAMIC_VOCAB, "The vocabulary dimension is marked dynamic."
    return None


def _without_escapes(reading: Reading, nodes: list[Node]) -> list[Node]:
    """Leave out the nodes whose log-probabilities [N, V] somebody else needs as well.

    They would have to be computed in any case, and the statistics would be one more sweep.
    """
    allowed = list(nodes)
    while True:
        needed = needed_nodes(reading, set(allowed))
        escaped = {n: w for n in allowed if (w := sorted(value_of(reading, n).wide & needed, key=str))}
        if not escaped:
            return allowed
        allowed = [n for n in allowed if n not in escaped]
        node, wide = next(iter(escaped.items()))
        reading.miss(node, Reason.LOGITS_ESCAPE, escape_fact(reading, wide[0], needed))
        reading.refused |= escaped.keys()


# Where it may be placed


def _grouped(reading: Reading, logits: Logits, nodes: list[Node]) -> list[Group]:
    """As few groups as in-place edits and changes of the gradient mode allow, each with its place."""
    groups: list[Group] = []
    for node in sorted(nodes, key=reading.timeline.position.__getitem__):
        alone = _alone(reading, logits, node)
        if alone is None:
            fact = "The logits or the labels are changed in place between their uses by this loss."
            reading.miss(node, Reason.MUTATED, fact)
        elif not any(_merge(reading, group, alone) for group in groups):
            groups.append(alone)
    return [
        group
        for group in groups
        if not (
            _edited_later(reading, group)
            or _input_edited_later(reading, group)
            or _placed_otherwise(reading, group)
        )
    ]


def _edited_later(reading: Reading, group: Group) -> bool:
    """Whether the logits are written after the loss, while its backward has to read them. Tells so."""
    timeline, node = reading.timeline, group.logits.node
    if not group.attached or not _wants_gradient(group.logits):
        return False
    edited = not timeline.unchanged(node, group.place, len(timeline.nodes))
    if edited:
        fact = "The logits are changed in place after this loss, whose backward reads them."
        reading.miss(headline(reading, group.nodes), Reason.MUTATED, fact)
    return edited


def _input_edited_later(reading: Reading, group: Group) -> bool:
    """Whether labels that are an argument of the graph are written after the loss. Tells so.

    AOTAutograd writes arguments at the end of the forward, and its backward may read them after that.
    """
    timeline = reading.timeline
    arguments = [node for node in timeline.nodes if node.op == "placeholder"]
    edited = group.attached and any(
        held.node is not None
        and not timeline.unchanged(held.node, group.place, len(timeline.nodes))
        and any(timeline.shares_storage(held.node, argument) for argument in arguments)
        for held in group.labels.values()
    )
    if edited:
        fact = (
            "The labels are an argument that is changed in place after this loss, whose backward reads them."
        )
        reading.miss(headline(reading, group.nodes), Reason.MUTATED, fact)
    return edited


def _placed_otherwise(reading: Reading, group: Group) -> bool:
    """Whether ranks hold other rows or classes of what stands beside the logits than of these. Tells so."""
    if not group.distributed:
        return False
    facts = [_label_fact(group, held) for held in group.labels.values()]
    facts += [_outside_fact(group, held) for held in group.outside.values()]
    fact = next((fact for fact in facts if fact is not None), None)
    if fact is not None:
        reading.miss(headline(reading, group.nodes), Reason.PLACEMENTS, fact)
    return fact is not None


def _label_fact(group: Group, held: Label) -> str | None:
    z: Any = tensor_of(group.logits.node)
    axis, moved = group.logits.axis, _first_rows_moved(held.steps)
    if held.node is not None:
        y: Any = tensor_of(held.node)
        return beside_fact(z, axis, "The labels", y, int(held.kept == 0), None, moved)
    if held.column is not None:
        return None
    return beside_fact(z, axis, "The labels, which are the numbers of the rows,", torch.arange(0), 0, None)


def _outside_fact(group: Group, held: Outside) -> str | None:
    z: Any = tensor_of(group.logits.node)
    x = tensor_of(held.node)
    assert x is not None
    assert held.axis is not None
    missing = len(shape_of(held.like)) - x.dim()
    first = {"row": int(held.axis == 0) - missing, "columns": int(held.axis == 0)}.get(held.kind)
    classes = held.axis - missing if held.kind in ("classes", "columns") else None
    if held.kind == "scalar":
        return None
    name = "The weights" if classes is not None else "The numbers of the rows"
    return beside_fact(z, group.logits.axis, name, x, first, classes, _first_rows_moved(held.steps))


def _first_rows_moved(steps: tuple[Step, ...]) -> bool:
    """Whether the first dimension of the rows, over which ranks may share them, does not stay as it is."""
    return any(
        isinstance(s, Permute) or (isinstance(s, Slice) and bool(s.left[0] + s.right[0])) for s in steps
    )


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
    group = Group(logits, first, last, not value.detached, position, [node], labels, outside)
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
        return (
            mode is True
            if group.attached and not group.logits.inference
            else (mode == INFERENCE) == group.logits.inference
        )

    wanted = min(max(group.first, wanted), group.last)
    later, earlier = range(wanted, group.last + 1), range(wanted - 1, group.first - 1, -1)
    return next((place for places in (later, earlier) for place in places if fits(place)), None)


def _first_use(reading: Reading, node: Node) -> int:
    return min(
        (reading.timeline.position[user] for user in node.users), default=reading.timeline.position[node]
    )


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
    both = Group(group.logits, first, last, attached, group.place, group.nodes + other.nodes)
    place = _place(reading, both, group.place)
    if place is None:
        return False
    group.first, group.last, group.attached, group.place = first, last, attached, place
    group.nodes += other.nodes
    group.labels |= other.labels
    group.outside |= other.outside
    return True
