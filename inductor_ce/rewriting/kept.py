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
from ..reading import spellings
from ..reading.aten import is_backward
from ..reading.values import Reading
from .escapes import read_by
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
    example = tensor_of(user)
    return example is not None and not (example.is_floating_point() and example.requires_grad)


def _for_whom(user: Node) -> str:
    while spellings.is_step(user, "detach") and user.users:
        user = next(iter(user.users))
    if user.op == "output":
        return "returned"
    return f"{'stored' if any(written_by(user)) else 'read'} by {name_of(user)} {where_is(user)}"
