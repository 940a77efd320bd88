"""Calls of autograd.Functions, as Dynamo captures them: a forward and a backward, each a graph of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from ..common.compat.graphs import autograd_function_apply, fake_mode_of, fresh_like, set_grad_enabled
from .exported import CALLS, KEY, called
from .shapes import number_of, tensor_of


class Body(NamedTuple):
    """A call of an autograd.Function, as Dynamo captures it."""

    call: Node
    forward: Graph
    backward: Graph
    inputs: tuple[Any, ...]


def function_bodies(graph: Graph) -> Iterator[Body]:
    """The calls of autograd.Functions in a graph."""
    for node in graph.find_nodes(op="call_function", target=autograd_function_apply):
        forward, backward = map(_graph_of, node.args[:2])
        if forward is not None and backward is not None:
            yield Body(node, forward, backward, tuple(node.args[2:]))


def _graph_of(node: Any) -> Graph | None:
    owner = node.graph.owning_module if isinstance(node, Node) and node.op == "get_attr" else None
    return getattr(getattr(owner, str(node.target), None), "graph", None) if owner is not None else None


def inner(graph: Graph) -> tuple[list[Node], list[Node], Any]:
    """(placeholders, operations, what is returned), without the switches of the gradient."""
    nodes = list(graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    steps = [n for n in nodes if n.op not in ("placeholder", "output") and n.target is not set_grad_enabled]
    return inputs, steps, graph.output_node().args[0]


class Joined(NamedTuple):
    """A forward and its backward in one graph.

    Attributes:
        graph: both.
        nodes: in it, of each node of the two.
        result: of the forward.
        gradients: of each input its gradient, where it has one.
        upstream: the gradient of the result.
    """

    graph: Graph
    nodes: dict[Node, Node]
    result: Node
    gradients: dict[Node, Node]
    upstream: Node


def joined(body: Body) -> Joined | None:
    """Both graphs in one, None for what has several results or an unusual form."""
    inputs, steps, returned = inner(body.forward)
    gradients, backward, passed = inner(body.backward)
    if len(inputs) != len(body.inputs) or not isinstance(returned, tuple) or len(returned) != 2:
        return None
    outputs, saved = returned
    if not isinstance(outputs, tuple) or len(outputs) != 1 or len(gradients) != 1 + len(saved):
        return None
    both = Graph()
    nodes: dict[Node, Node] = {}
    for node in [*inputs, gradients[0], *steps]:
        nodes[node] = both.node_copy(node, nodes.__getitem__)
    for node, given in zip(inputs, body.inputs, strict=True):
        if isinstance(given, Node):  # as it is now: lazy logits may have been taken apart since it was traced
            nodes[node].meta[KEY] = given.meta.get(KEY)
    for node, value in zip(gradients[1:], saved, strict=True):
        if not isinstance(value, Node):
            return None
        nodes[node] = nodes[value]
    for node in backward:
        nodes[node] = both.node_copy(node, nodes.__getitem__)
    passed = passed if isinstance(passed, (tuple, list)) else (passed,)
    tensors = [node for node, given in zip(inputs, body.inputs, strict=True) if isinstance(given, Node)]
    if len(passed) != len(tensors) or not isinstance(outputs[0], Node):
        return None
    _make_examples(both)
    of = {nodes[t]: nodes[dz] for t, dz in zip(tensors, passed, strict=True) if isinstance(dz, Node)}
    return Joined(both, nodes, nodes[outputs[0]], of, nodes[gradients[0]])


def _make_examples(graph: Graph) -> None:
    """Examples of what runs, as it does in one graph: which views share their storage, and which do not."""
    mode = next(fake_mode_of(x) for node in graph.nodes if (x := tensor_of(node)) is not None)
    with mode, torch.no_grad():
        for node in graph.nodes:
            if node.op == "placeholder":
                example = tensor_of(node)
                node.meta[KEY] = node.meta.get(KEY) if example is None else fresh_like(example)
            elif node.op in CALLS and number_of(node) is None:  # a number is what it was, wherever it is from
                node.meta[KEY] = called(node)
