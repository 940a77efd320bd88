"""The only part of a tensor that is cut into parts: all of it.

    split(x, n, d)[0] = x[:]      unbind(x, d)[0] = x.squeeze(d)      x[0] = x.squeeze(0)      of one part

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
    """Let a view of all take what a cut into one part gives, of tensors with at least `min_vocab` entries
    along a dimension."""
    timeline, gone = None, set[Node]()
    for node in list(graph.nodes):
        if node in gone:
            continue
        step, args = spellings.read(node) or (None, {})
        source = args.get("input")
        example = tensor_of(source)
        if step is None or example is None or not is_plain_tensor(example) or example.dim() < 2:
            continue
        call = _view(step.name, node, args) if max(map(hint, example.shape)) >= min_vocab else None
        taken = [node] if tensor_of(node) is not None else [*node.users]
        if call is None or not all(user is node or _takes_the_first(user) for user in taken):
            continue
        timeline = timeline or Timeline(graph)
        build = Builder(graph, node, like=taken[0])
        whole = build(call[0], source, call[1])
        build.tell_gradients(timeline.grad_mode(node) is True)
        for user in taken:
            user.replace_all_uses_with(whole)
        for user in (*taken, *{node}.difference(taken)):
            graph.erase_node(user)
            gone.add(user)


def _takes_the_first(user: Node) -> bool:
    return user.target is operator.getitem and user.args[1] in (0, -1)


def _view(name: str, node: Node, args: dict[str, Any]) -> tuple[Any, Any] | None:
    """The view that a cut into one part is, and what it is given; None where it is no such cut."""
    source, parts, dim = shape_of(args["input"]), node.meta.get("example_value"), args.get("dim", 0)
    if name == "getitem":
        is_lone = type(args["index"]) is int and args["index"] in (0, -1) and equal(source[0], 1)
        return ("squeeze", 0) if is_lone and node.users else None
    if name not in _CUTS or not isinstance(parts, (list, tuple)) or len(parts) != 1 or not node.users:
        return None
    if name == "unbind":
        is_lone = isinstance(dim, int) and equal(source[dim], 1)
        return ("squeeze", dim) if is_lone else None
    return (operator.getitem, slice(None)) if same_shape(parts[0].shape, source) else None
