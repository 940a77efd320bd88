"""Kept beside a loss: log-probabilities [N, V] that the user returns, sorts or stores as well.

They are computed as written, by themselves, and the loss from the logits; the gradient of both is the sum
that autograd makes. Where a gradient flows through all of them into another loss, the user's backward sweeps
them anyway, and all is left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.fx import Node

from ..common.findings import name_of, where_is
from ..graph.shapes import same_shape, shape_of, tensor_of
from ..graph.timeline import written_by
from ..graph.walk import reached
from ..reading import spellings
from ..reading.aten import is_backward
from ..reading.values import LossValue, Reading, RowValue
from .escapes import is_of_each, read_by
from .groups import value_of, wants_gradient

# What has results of which few elements of a row have a gradient.
OF_FEW = {"topk", "sort", "msort", "max", "min", "kthvalue", "mode", "median", "cummax"}


def kept(reading: Reading, node: Node, wide: Sequence[Node], needed: set[Node]) -> str:
    """What is kept of the log-probabilities `wide` of a loss, and for whom; "" where it is better left."""
    value = value_of(reading, node)
    if value.detached or not wants_gradient(value.logits):
        return ""  # there is no backward that would be spared
    readers = [(made, user) for made in wide for user in _last_readers(reading, made, needed)]
    if not readers or not all(_keeps(reading, user) for _, user in readers):
        return ""
    made, user = readers[0]
    what = f"{name_of(made)} of all classes [{'x'.join(map(str, shape_of(made)))}]"
    return f"{what}, {_for_whom(user)}"


def is_target(reading: Reading, node: Node, wide: Sequence[Node]) -> bool:
    """Whether log-probabilities without a gradient are what another loss is weighed by, as a teacher's are.

    They are made for that, and what is picked of them costs no sweep.
    """
    value = value_of(reading, node)
    if not value.detached and wants_gradient(value.logits):
        return False
    others = [v for v in reading.values.values() if isinstance(v, (RowValue, LossValue))]
    brought = {node for v in others if v.logits != value.logits for node in reading.brought(v)}
    made_of = reached(brought, lambda node: [s for s in node.all_input_nodes if is_of_each(node, s)])
    return not set(made_of).isdisjoint(wide)


def _last_readers(reading: Reading, made: Node, needed: set[Node]) -> Iterator[Node]:
    """Who needs log-probabilities, or what is made of them by views, functions of each element, and steps."""
    frontier, seen = [made], {made}
    while frontier:
        node = frontier.pop(0)
        for user in node.users:
            if user in seen or user not in needed or node not in read_by(user):
                continue
            seen.add(user)
            if (_has_all(user, made) or reading.on_logits(user)) and not _keeps(reading, user):
                frontier.append(user)
                if not any(each in needed for each in user.users):
                    yield user
            else:
                yield user


def _has_all(user: Node, made: Node) -> bool:
    """Whether a node has a number for each of the log-probabilities."""
    example = tensor_of(user)
    if example is None or any(written_by(user)):
        return False
    step = spellings.step_of(user)
    viewed = step is not None and step.view is not None
    return viewed or same_shape(example.shape, shape_of(made))


def _keeps(reading: Reading, user: Node) -> bool:
    """Whether no gradient comes back to all log-probabilities from a node, as far as this graph knows."""
    if is_backward(user):
        return False
    if user.op == "output" or name_of(user) in OF_FEW or any(written_by(user)):
        return True
    return _has_no_gradient(user) or _is_only_looked_at(user)


def _has_no_gradient(node: Node) -> bool:
    example = tensor_of(node)
    return example is not None and not (example.is_floating_point() and example.requires_grad)


def _is_only_looked_at(node: Node) -> bool:
    """Whether all that is made of a node is detached in the end, as a metric is that is logged."""
    frontier, seen = [node], {node}
    while frontier:
        made = frontier.pop()
        if made.op == "output" or not made.users or any(written_by(made)):
            return False
        fresh = [user for user in made.users if user not in seen and not _has_no_gradient(user)]
        seen.update(fresh)
        frontier += fresh
    return True


def _for_whom(user: Node) -> str:
    while spellings.is_step(user, "detach") and user.users:
        user = next(iter(user.users))
    if user.op == "output":
        return "returned"
    return f"{'stored' if any(written_by(user)) else 'read'} by {name_of(user)} {where_is(user)}"
