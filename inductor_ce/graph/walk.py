"""Walks over nodes and graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from torch.fx import GraphModule, Node

T = TypeVar("T")


def graphs_within(module: GraphModule) -> list[GraphModule]:
    """A captured module, and the bodies that its graph and those within it name, each once.

    A body that Dynamo has put in the place of its only call is still an attribute, and none of these.
    """
    return [module, *reached(_bodies_of(module), _bodies_of)]


def _bodies_of(module: GraphModule) -> list[GraphModule]:
    named = dict.fromkeys(node.target for node in module.graph.find_nodes(op="get_attr"))
    found = (getattr(module, str(name), None) for name in named if "." not in str(name))
    return [each for each in found if isinstance(each, GraphModule)]


def args_of(node: Node) -> tuple[Any, ...]:
    return node.args


def reached(starts: Iterable[T], beside: Callable[[T], Iterable[T]]) -> Iterator[T]:
    """All nodes that steps from a node to those `beside` it lead to, the starts too, each once."""
    stack = list(dict.fromkeys(starts))
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        new = [other for other in beside(node) if other not in seen]
        stack += new
        seen.update(new)


def sources_of(node: Node) -> list[Node]:
    return node.all_input_nodes
