"""Examples for the nodes of a graph that Dynamo did not capture, such as one of `torch.export`.

What such a graph records of its tensors does not tell of which a gradient is wanted, so it is run once on
fake tensors. Whoever compiles it may ask for the gradient of any input.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..common.compat.graphs import FakeTensor, FakeTensorMode, is_fake, tree_leaves

KEY = "example_value"
CALLS = ("call_function", "call_method")


def is_exported(graph: Graph) -> bool:
    """Whether a graph has examples of its inputs, but not those by Dynamo."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return any("val" in node.meta for node in inputs) and not any(KEY in node.meta for node in inputs)


def has_guards(graph: Graph) -> bool:
    """Whether what is made of a graph is called where its guards hold alone, as what Dynamo captured is."""
    return not any("val" in node.meta for node in graph.nodes if node.op == "placeholder")


def make_examples(graph: Graph) -> None:
    """Give each node its example. What calls a module has none, nor has what is made of it."""
    values = [leaf for node in graph.nodes for leaf in tree_leaves(node.meta.get("val"))]
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    if mode is None:
        return
    with mode:
        for node in graph.nodes:
            if node.op == "placeholder":
                node.meta[KEY] = _input(node.meta.get("val"), mode)
            elif node.op == "get_attr":
                node.meta[KEY] = _attribute(graph, node, mode)
            elif node.op in CALLS and all(KEY in source.meta for source in node.all_input_nodes):
                node.meta[KEY] = called(node)


def _input(value: Any, mode: FakeTensorMode) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, FakeTensor) and value.fake_mode is mode:
        made = value.detach()
    else:
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return _wanting_gradient(made) if torch.is_grad_enabled() else made


def _wanting_gradient(made: torch.Tensor) -> torch.Tensor:
    """No leaf, which could not be changed in place."""
    return made.requires_grad_().clone() if made.is_floating_point() else made


def _attribute(graph: Graph, node: Node, mode: FakeTensorMode) -> Any:
    value = attrgetter(str(node.target))(graph.owning_module)
    if not isinstance(value, torch.Tensor) or is_fake(value):
        return value
    return mode.from_tensor(value, static_shapes=True)


def called(node: Node) -> Any:
    """What a node gives for the examples of its arguments."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta[KEY])
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]
