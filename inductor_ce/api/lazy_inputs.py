"""Lazy logits that enter a compiled function: taken apart, their linear layer and chain put behind the parts.

Dynamo takes the class as one input of a graph, as it can be flattened. In a copy of the graph that input
becomes inputs for the parts, so that the loss has its head and is recognised as if both had been compiled
together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node

from ..common.compat.dynamo import attribute_source, moved_facts
from ..graph.builder import Builder
from .lazy_logits import LazyLogits

Flatten = Callable[[Sequence[Any]], list[Any]]


def taken_apart(module: GraphModule, inputs: Sequence[Any]) -> tuple[GraphModule, list[Any], Flatten | None]:
    """(the graph, its inputs, what arguments are put through) with parts in place of lazy logits."""
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    lazy = [isinstance(node.meta.get("example_value"), LazyLogits) for node in places]
    if not any(lazy) and not any(isinstance(x, LazyLogits) for x in inputs):
        return module, list(inputs), None
    module, twins = copied_module(module)
    examples: list[Any] = []
    apart: list[bool] = []
    behind = twins[places[-1]].next
    for node, is_lazy, given in zip(places, lazy, inputs, strict=True):
        example = node.meta.get("example_value")
        apart.append(is_lazy and example.source.recipe.is_of_here)
        if apart[-1]:
            examples += _apart(module.graph, twins[node], example, given, behind)
        else:
            if is_lazy:
                twins[node].meta["example_value"] = example.made()
            examples.append(given.made() if isinstance(given, LazyLogits) else given)
    module.recompile()
    return module, examples, functools.partial(_flattened, tuple(apart))


def _apart(graph: Graph, node: Node, example: LazyLogits, given: Any, behind: Node) -> list[Any]:
    """Replace an input by its parts. Returns examples of these."""
    source = example.source
    parts = []
    for i, of_example in enumerate(source.parts):
        name = f"_part{i}"
        with graph.inserting_before(node):
            part = graph.placeholder(f"{node.name}{name}")
        part._dynamo_source = attribute_source(node, name)
        part.meta = {k: v for k, v in node.meta.items() if k not in ("example_value", "grapharg")}
        part.meta["example_value"] = of_example
        parts.append(part)
    build = Builder(graph, behind, like=parts[0])
    node.replace_all_uses_with(source.recipe.nodes(build, parts))
    graph.erase_node(node)
    return list(given.source.parts if isinstance(given, LazyLogits) else source.parts)


def _flattened(apart: tuple[bool, ...], arguments: Sequence[Any]) -> list[Any]:
    flat: list[Any] = []
    for argument, is_apart in zip(arguments, apart, strict=True):
        if not isinstance(argument, LazyLogits):
            flat.append(argument)
        elif is_apart:
            argument.source.check()
            flat += argument.source.parts
        else:
            flat.append(argument.made())
    return flat


def copied_module(module: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A module with a copy of the graph, whose nodes Dynamo does not know, and each node's twin."""
    graph = Graph()
    twins: dict[Node, Node] = {}
    graph.output(graph.graph_copy(module.graph, twins))
    for node, twin in twins.items():
        twin.meta = dict(node.meta)
        if hasattr(node, "_dynamo_source"):
            twin._dynamo_source = node._dynamo_source
    made = GraphModule(module, graph)
    moved_facts(module, made)
    return made, twins
