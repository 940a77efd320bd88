"""Kept beside a loss: log-probabilities or probabilities [N, V] that the program uses for more than that.

They are computed as written, by themselves, and the loss from the logits; the gradient of both is the sum
that autograd makes. Where it is the gradient of all classes, and the loss is made of nothing else that is as
large, the statistics would be one more sweep, and nothing is spared: all is left as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch.fx import Node

from ..common.findings import name_of, where_is
from ..graph.shapes import Size, equal, shape_of, tensor_of
from ..graph.timeline import written_by
from ..graph.walk import reached
from ..reading import spellings
from ..reading.aten import is_backward
from ..reading.values import LossValue, Reading, RowValue
from .escapes import is_of_each, read_by, readers_of_copies
from .groups import value_of, wants_gradient

# What has results of which few elements of a row have a gradient.
OF_FEW = {"topk", "sort", "msort", "max", "min", "kthvalue", "mode", "median", "cummax"}


def may_keep(reading: Reading, nodes: Iterable[Node]) -> bool:
    """Whether there is a backward of some logits that losses are spared, whose log-probabilities stay."""
    values = [value_of(reading, node) for node in nodes]
    return any(not value.detached and wants_gradient(value.logits) for value in values)


def for_whom(reading: Reading, end: Node, wide: Sequence[Node], needed: set[Node]) -> str:
    """Who needs which of the log-probabilities `wide` of the loss that ends at a node.

    "" where that is their backward, written out, or joins them to the loss of their own row, as what scales
    entries by their sum: gradients that cancel would be rounded before they meet.
    """
    readers = [(made, user) for made in wide for _, user in _first_readers(reading, made, needed)]
    if not readers or any(is_backward(user) for made in wide for user in readers_of_copies(made)):
        return ""
    beside = {user for made in wide for user in made.users if user in needed and _may_learn(user)}
    made_of_it = set(reached(filter(_may_learn, [end]), lambda node: filter(_may_learn, node.users)))
    if beside.difference(wide) & made_of_it:
        return ""
    made, user = readers[0]
    what = f"{name_of(made)} of all classes [{'x'.join(map(str, shape_of(made)))}]"
    return f"{what}, {_told(user)}"


def is_spared(reading: Reading, end: Node, wide: Sequence[Node], needed: set[Node]) -> bool:
    """Whether a loss that leaves the log-probabilities `wide` to others is spared a sweep of their size."""
    own = value_of(reading, end).wide - needed
    if any((step := spellings.step_of(node)) is None or step.view is None for node in own):
        return True
    logits = value_of(reading, end).logits
    classes = shape_of(logits.node)[logits.axis]
    readers = (reader for made in wide for reader in _first_readers(reading, made, needed))
    return not any(_gives_all_a_gradient(*reader, needed, classes) for reader in readers)


def is_target(reading: Reading, node: Node, wide: Sequence[Node]) -> bool:
    """Whether log-probabilities without a gradient are what another loss is weighed by, as a teacher's are.

    So are those that are projected to other bins, the targets of a distribution.
    They are made for that, and what is picked of them costs no sweep.
    """
    value = value_of(reading, node)
    if not value.detached and wants_gradient(value.logits):
        return False
    others = [v for v in reading.values.values() if isinstance(v, (RowValue, LossValue))]
    brought = {node for v in others if v.logits != value.logits for node in reading.brought(v)}
    return not set(reached(brought, reading.timeline.sources)).isdisjoint(wide)


def _first_readers(reading: Reading, made: Node, needed: set[Node]) -> Iterator[tuple[Node, Node]]:
    """Log-probabilities, or what the algebra makes of them, and who needs them and is none of its steps."""
    frontier, seen = [made], {made}
    while frontier:
        node = frontier.pop(0)
        for user in node.users:
            if user in seen or user not in needed or node not in read_by(user):
                continue
            seen.add(user)
            if _is_step(reading, user, made) and any(each in needed for each in user.users):
                frontier.append(user)
            else:
                yield node, user


def _is_step(reading: Reading, user: Node, made: Node) -> bool:
    """Whether a node is read as being of the same logits, or is a view."""
    theirs, own = reading.on_logits(user), reading.on_logits(made)
    step = spellings.step_of(user)
    if any(written_by(user)) or step is None:
        return False
    return step.view is not None or (theirs is not None and own is not None and theirs.logits == own.logits)


def _gives_all_a_gradient(made: Node, user: Node, needed: set[Node], classes: Size) -> bool:
    """Whether a gradient of all log-probabilities comes back from a reader, as far as this graph knows."""
    frontier, seen = [(made, user)], {user}
    while frontier:
        source, node = frontier.pop()
        is_stored = any(written_by(node)) and source not in written_by(node)
        if is_stored or _has_no_gradient(source) or not _may_learn(node) or name_of(node) in OF_FEW:
            continue
        if is_of_each(node, source) or _is_sum_of_parts(node, source, classes):
            fresh = [each for each in node.users if each in needed and each not in seen]
            seen.update(fresh)
            frontier += [(node, each) for each in fresh]
        elif not _is_only_looked_at(source, node, needed):
            return True
    return False


def _is_sum_of_parts(node: Node, source: Node, classes: Size) -> bool:
    """Whether probabilities are summed over dimensions that are not of the classes, as over experts."""
    spelled = spellings.read(node)
    if spelled is None or spelled[0].name not in ("sum", "mean") or spelled[1].get("input") is not source:
        return False
    shape, dims = shape_of(source), spelled[1].get("dim")
    given = [dims] if isinstance(dims, int) else dims
    if not isinstance(given, (list, tuple)) or not given:
        return False
    return not any(equal(shape[dim], classes) for dim in given)


def _is_only_looked_at(source: Node, node: Node, needed: set[Node]) -> bool:
    """Whether all that a node makes of a source is detached in the end, as a metric is that is logged, or is
    edited and never read."""
    frontier, seen = [node], {source, node}
    while frontier:
        made = frontier.pop()
        if made.op == "output" or not seen.issuperset(written_by(made)):
            return False
        users = [user for user in made.users if user in needed]
        if not users and not any(written_by(made)):
            return False
        fresh = [user for user in users if user not in seen and not _has_no_gradient(user)]
        seen.update(fresh)
        frontier += fresh
    return True


def _told(user: Node) -> str:
    while spellings.is_step(user, "detach") and user.users:
        user = next(iter(user.users))
    if user.op == "output":
        return "returned"
    return f"{'stored' if any(written_by(user)) else 'read'} by {name_of(user)} {where_is(user)}"


def _may_learn(user: Node) -> bool:
    """Whether a gradient may come back by a node within the graph."""
    return user.op != "output" and not _has_no_gradient(user)


def _has_no_gradient(node: Node) -> bool:
    example = tensor_of(node)
    return example is not None and not (example.is_floating_point() and example.requires_grad)
