"""What stays in the graph, and what is told of it: log-probabilities that escape, losses not read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.fx import Node

from . import spellings
from .reading import LossValue, Reading, RowValue, VocabValue
from .rows import hint, shape_of
from .sites import Reason, user_line
from .views import broadcast_operand


def needed_nodes(reading: Reading, replaced: set[Node]) -> set[Node]:
    """The nodes that stay alive once `replaced` are computed otherwise."""
    needed: set[Node] = set()
    wanted = {node for end in replaced for node in _brought(reading, end)}
    for node in reversed(reading.timeline.nodes):
        is_read = node in reading.values or node in reading.parted
        if node not in replaced and (not is_read or node in wanted):
            needed.add(node)
            wanted.update(_read_by(node))
    return needed


def _read_by(node: Node) -> Sequence[Node]:
    """The nodes whose elements, not only their shape, a node reads."""
    operand = broadcast_operand(node)
    if operand is not None:
        return [operand]
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return [] if name in SHAPE_ONLY else node.all_input_nodes


SHAPE_ONLY = {
    *("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"),
    *("size", "dim", "numel", "broadcast_tensors"),
}


def escape_fact(reading: Reading, wide: Node, needed: set[Node]) -> str:
    """Who else needs the log-probabilities `wide`."""
    what = f"The {_name(wide)} of all classes [{'x'.join(map(str, shape_of(wide)))}]"
    user: Node | None = wide
    while user is not None and (user is wide or isinstance(reading.values.get(user), VocabValue)):
        user = next((u for u in user.users if u in needed and user in _read_by(u)), None)
    if user is None:
        return f"{what} is needed elsewhere."
    if user.op == "output":
        return f"{what} is returned, so it is in memory anyway."
    location, code = user_line(user)
    return f"{what} is also used by {_name(user)} at {location} ({code})."


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def tell_unread(
    reading: Reading, replaced: set[Node], min_vocab: int, everywhere: tuple[Reason, str] | None
) -> None:
    """Tell of log-probabilities over a vocabulary that end in something the algebra does not have.

    `everywhere` is the reason that stands for all of the graph, if there is one.
    """
    needed = needed_nodes(reading, replaced)
    fused = {reading.on_logits(node).logits for node in replaced}  # type: ignore[union-attr]
    brought = {n for node in replaced for n in _brought(reading, node)}
    for node in reading.timeline.nodes:
        value = reading.on_logits(node)
        if (
            value is None
            or node not in needed
            or isinstance(value, LossValue)
            or not _normalises(reading, node)
        ):
            continue
        if isinstance(value, RowValue) and value.logits in fused:
            continue  # the statistic of a loss that is fused, needed for something else as well
        if value.logits.node in reading.values and reading.on_logits(value.logits.node) is not None:
            continue  # rows of another loss, over which the user normalises
        if brought & {node, *_readers(reading, node)}:
            continue  # what another loss is weighed by
        size = hint(shape_of(value.logits.node)[value.logits.axis])
        if size >= min_vocab and not _is_told(reading, node):
            reading.miss(node, *(everywhere or _unread_fact(reading, node)))


def _is_made_of(node: Node, source: Node) -> bool:
    """Whether a node is computed from what `source` is computed from, the log-probabilities' own logits."""
    frontier, seen = [node], {node, *source.all_input_nodes}
    while frontier:
        for argument in frontier.pop().all_input_nodes:
            if argument is source or argument in source.all_input_nodes:
                return True
            if argument not in seen:
                seen.add(argument)
                frontier.append(argument)
    return False


def _brought(reading: Reading, node: Node) -> set[Node]:
    value = reading.values[node]
    return reading.brought(value) if isinstance(value, (RowValue, LossValue)) else set()


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


def _unread_fact(reading: Reading, node: Node) -> tuple[Reason, str]:
    """Name the step after which the reading broke off."""
    for user in _readers(reading, node):
        weigher = reading.weighers.get(user)
        if weigher is not None and not _is_made_of(weigher, node):
            what = f"{weigher.name} {list(shape_of(weigher))}"
            fact = f"The classes are weighed by {what}, of which a gradient is wanted."
            return Reason.SOFT_TARGETS, fact
        if user.op == "output":
            fact = f"The result of {_name(node)} is returned; no loss is taken from it here."
            return Reason.NOT_UNDERSTOOD, fact
        if user not in reading.values:
            location, code = user_line(user)
            fact = f"The result of {_name(node)} goes into {_name(user)} at {location} ({code})."
            return Reason.NOT_UNDERSTOOD, fact
    return Reason.NOT_UNDERSTOOD, f"The result of {_name(node)} is not used."
