"""Legality: which of the values that recognition read may be replaced, where, and why not the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import sympy
import torch
from torch.fx import Node

from . import algebra, spellings
from .compat import is_function_transform, is_kept_dynamic, is_plain_tensor
from .config import Options
from .reading import Label, Logits, LossValue, Reading, RowValue, VocabValue
from .rows import hint, shape_of
from .sites import Reason, user_line
from .timeline import Mode, tensor_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

TRANSFORMED = (Reason.FUNCTION_TRANSFORM, "The graph runs under a transform of torch.func, such as vmap.")

Replaceable = RowValue | LossValue


@dataclass
class Group:
    """Nodes to be computed from one `row_stats` call, which goes before the node at `place`."""

    logits: Logits
    first: int
    last: int
    grad_mode: Mode
    place: int
    nodes: list[Node] = field(default_factory=list)
    labels: dict[sympy.Symbol, Label] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """V as a number. A symbolic V is specialised by this: the kernels are built for one vocabulary."""
        return int(shape_of(self.logits.node)[self.logits.axis])


def judge(reading: Reading, options: Options) -> list[Group]:
    """Decide from graph structure, global shapes and options alone, so that all ranks decide alike."""
    groups: list[Group] = []
    transformed = any(is_function_transform(node.target) for node in reading.timeline.nodes)
    for logits, nodes in _losses(reading).items():
        refusal = TRANSFORMED if transformed else _refusal(logits, options)
        if refusal is not None:
            reading.miss(headline(reading, nodes), *refusal)
            continue
        allowed = _without_escapes(reading, nodes)
        if _is_loss(reading, allowed):
            groups += _grouped(reading, logits, allowed)
    _tell_unread(reading, groups, options)
    return groups


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
    return not value.expr.has(algebra.MAX) and any(
        u not in reading.values or reading.values[u].logits != value.logits for u in node.users
    )


def _is_loss(reading: Reading, nodes: list[Node]) -> bool:
    """A loss weighs the normaliser of a row against some of its logits."""
    exprs = [row_expr(reading, node) for node in nodes]
    normalised = any(e.has(algebra.LSE, algebra.LSE_EXTENDED) for e in exprs)
    return normalised and any(algebra.labels_of(e) or e.has(algebra.SUM) for e in exprs)


def row_expr(reading: Reading, node: Node) -> sympy.Expr:
    """The row expression of a node that may be replaced."""
    return _value(reading, node).expr


def _value(reading: Reading, node: Node) -> Replaceable:
    value = reading.values[node]
    assert isinstance(value, (RowValue, LossValue))
    return value


def headline(reading: Reading, nodes: list[Node]) -> Node:
    """The node to name a loss by: the first that picks a label."""
    return next((n for n in nodes if algebra.labels_of(row_expr(reading, n))), nodes[0])


# May it be replaced


def _refusal(logits: Logits, options: Options) -> tuple[Reason, str] | None:
    example = tensor_of(logits.node)
    assert example is not None
    if not is_plain_tensor(example):
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
        needed = _needed(reading, set(allowed))
        escaped = {n: w for n in allowed if (w := sorted(_value(reading, n).wide & needed, key=str))}
        if not escaped:
            return allowed
        allowed = [n for n in allowed if n not in escaped]
        node, wide = next(iter(escaped.items()))
        reading.miss(node, Reason.LOGITS_ESCAPE, _escape_fact(reading, wide[0], needed))
        reading.refused |= escaped.keys()


def _needed(reading: Reading, replaced: set[Node]) -> set[Node]:
    """The nodes that stay alive once `replaced` are computed otherwise."""
    needed: set[Node] = set()
    for node in reversed(reading.timeline.nodes):
        if node in replaced:
            continue
        if node not in reading.values or any(user in needed for user in node.users):
            needed.add(node)
    return needed


def _escape_fact(reading: Reading, wide: Node, needed: set[Node]) -> str:
    what = f"The {_name(wide)} of all classes [{'x'.join(map(str, shape_of(wide)))}]"
    user = next(u for u in wide.users if u in needed)
    while isinstance(reading.values.get(user), VocabValue):
        user = next(u for u in user.users if u in needed)
    if user.op == "output":
        return f"{what} is returned, so it is in memory anyway."
    location, code = user_line(user)
    return f"{what} is also used by {_name(user)} at {location} ({code})."


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


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
    return [group for group in groups if not _edited_later(reading, group)]


def _edited_later(reading: Reading, group: Group) -> bool:
    """Whether the logits are written after the loss, while its backward has to read them. Tells so."""
    timeline, node = reading.timeline, group.logits.node
    example = tensor_of(node)
    if group.grad_mode is not True or example is None or not example.requires_grad:
        return False
    edited = not timeline.unchanged(node, group.place, len(timeline.nodes))
    if edited:
        fact = "The logits are changed in place after this loss, whose backward reads them."
        reading.miss(headline(reading, group.nodes), Reason.MUTATED, fact)
    return edited


def _alone(reading: Reading, logits: Logits, node: Node) -> Group | None:
    """The group of one node, None where no place sees all its tensors as the node did."""
    timeline, value = reading.timeline, _value(reading, node)
    position = timeline.position[node]
    captured = reading.labels.get(logits, {})
    labels = {y: captured[y] for y in _labels(value)}
    windows = [(0, _first_use(reading, node))]
    windows.append(_logits_window(reading, logits))
    windows += [_label_window(reading, label) for label in labels.values()]
    first, last = max(w[0] for w in windows), min(w[1] for w in windows)
    if first > last:
        return None
    place = min(max(first, position), last)
    if timeline.grad_mode(place) != logits.grad_mode:
        return None
    return Group(logits, first, last, logits.grad_mode, place, [node], labels)


def _labels(value: Replaceable) -> list[sympy.Symbol]:
    picked = algebra.labels_of(value.expr)
    masked = [value.masked.y] if isinstance(value, LossValue) else []
    return list(dict.fromkeys(picked + masked))


def _first_use(reading: Reading, node: Node) -> int:
    return min(
        (reading.timeline.position[user] for user in node.users), default=reading.timeline.position[node]
    )


def _label_window(reading: Reading, label: Label) -> tuple[int, int]:
    """Where the labels can be had: before they were made from `label.base`, or as they are after."""
    first, _ = reading.timeline.window(label.base, label.position)
    return first, reading.timeline.window(label.node, label.position)[1]


def _logits_window(reading: Reading, logits: Logits) -> tuple[int, int]:
    """Where the logits read as they did at the version that the loss is of."""
    timeline = reading.timeline
    start = timeline.position[logits.node] + 1
    moments = range(start, len(timeline.nodes))
    moment = next(i for i in moments if timeline.version(logits.node, i) == logits.version)
    return timeline.window(logits.node, moment)


def _merge(reading: Reading, group: Group, other: Group) -> bool:
    """Take `other` into `group` if one place serves both."""
    first, last = max(group.first, other.first), min(group.last, other.last)
    place = max(first, group.place)
    if place > last or reading.timeline.grad_mode(place) != group.grad_mode:
        return False
    group.first, group.last, group.place = first, last, place
    group.nodes += other.nodes
    group.labels |= other.labels
    return True


# What was seen and not read


def _tell_unread(reading: Reading, groups: list[Group], options: Options) -> None:
    """Tell of log-probabilities over a vocabulary that end in something the algebra does not have."""
    needed = _needed(reading, {n for g in groups for n in g.nodes})
    for node, value in reading.values.items():
        if node not in needed or isinstance(value, LossValue) or not _normalises(reading, node):
            continue
        if isinstance(value, RowValue) and value.logits in {g.logits for g in groups}:
            continue  # the statistic of a loss that is fused, needed for something else as well
        if value.logits.node in reading.values:  # rows of another loss, over which the user normalises
            continue
        size = hint(shape_of(value.logits.node)[value.logits.axis])
        if size >= options.min_vocab and not _is_told(reading, node):
            reading.miss(node, Reason.NOT_UNDERSTOOD, _unread_fact(reading, node))


def _normalises(reading: Reading, node: Node) -> bool:
    """Whether a loss seems to begin or to have been taken here: a normaliser, or probabilities with a log."""
    step = _step(node)
    if step == "softmax":
        return any(_step(user) == "log" for user in _readers(reading, node))
    return step in ("log_softmax", "logsumexp", "log")


def _step(node: Node) -> str | None:
    spelled = spellings.read(node)
    return None if spelled is None else spelled[0]


def _readers(reading: Reading, node: Node) -> Iterator[Node]:
    """The users of a node, and those of the ones that the algebra has read, nearest first."""
    frontier, seen = [node], {node}
    while frontier:
        fresh = [user for user in frontier.pop(0).users if user not in seen]
        yield from fresh
        seen.update(fresh)
        frontier += [user for user in fresh if user in reading.values]


def _is_told(reading: Reading, node: Node) -> bool:
    return any(user in reading.refused for user in _readers(reading, node))


def _unread_fact(reading: Reading, node: Node) -> str:
    """Name the step after which the reading broke off."""
    for user in _readers(reading, node):
        if user.op == "output":
            return f"The result of {_name(node)} is returned; no loss is taken from it here."
        if user not in reading.values:
            location, code = user_line(user)
            return f"The result of {_name(node)} goes into {_name(user)} at {location} ({code})."
    return f"The result of {_name(node)} is not used."
