"""The only part of a tensor that is cut into parts: all of it.

    split(x, n, d)[0] = x[:]        unbind(x, d)[0] = x[..., 0, ...]        of one part

So do loops over chunks of 128 rows where there are fewer, or over the sequences of a batch of one. What puts
parts together that a loop has taken knows several of them alone; here one is the whole.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, Node

from ..common.compat.graphs import is_plain_tensor
from ..graph.builder import Builder
from ..graph.shapes import equal, hint, same_shape, shape_of, tensor_of
from ..graph.timeline import Timeline
from ..reading import spellings

_CUTS = ("split", "chunk", "unbind")


def take_lone_parts(graph: Graph, min_vocab: int) -> None:
    """Let an index take what a cut into one part gives, of tensors with at least `min_vocab` entries along
    a dimension."""
    timeline = Timeline(graph)
    for node in list(graph.nodes):
        index = _index(node)
        if index is None or max(map(hint, shape_of(_source(node)))) < min_vocab:
            continue
        taken = [*node.users]
        if not all(user.target is operator.getitem and user.args[1] in (0, -1) for user in taken):
            continue
        build = Builder(graph, node, like=taken[0])
        whole = build(operator.getitem, _source(node), index)
        build.tell_gradients(timeline.grad_mode(node) is True)
        for user in taken:
            user.replace_all_uses_with(whole)
            graph.erase_node(user)
        graph.erase_node(node)


def _source(node: Node) -> Any:
    step, args = spellings.read(node) or (None, {})
    return None if step is None else args.get("input")


def _index(node: Node) -> tuple[Any, ...] | None:
    """What a cut takes of each dimension for its one part; None where it is no such cut."""
    step, args = spellings.read(node) or (None, {})
    parts, dim = node.meta.get("example_value"), args.get("dim", 0)
    if step is None or step.name not in _CUTS or not node.users or not isinstance(dim, int):
        return None
    example = tensor_of(args.get("input"))
    if (
        not isinstance(parts, (list, tuple))
        or len(parts) != 1
        or example is None
        or not is_plain_tensor(example)
    ):
        return None
    source = shape_of(args["input"])
    if step.name == "unbind":
        dim %= len(source)
        return (*[slice(None)] * dim, 0) if equal(source[dim], 1) else None
    return (slice(None),) if same_shape(parts[0].shape, source) else None
