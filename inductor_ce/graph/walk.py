"""Walks over nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.fx import Node


def args_of(node: Node) -> tuple[Any, ...]:
    return node.args


def reached(starts: Iterable[Node], beside: Callable[[Node], Iterable[Node]]) -> Iterator[Node]:
    """All nodes that steps from a node to those `beside` it lead to, the starts too, each once."""
    stack = list(starts)
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        new = [other for other in beside(node) if other not in seen]
        stack += new
        seen.update(new)


def sources_of(node: Node) -> list[Node]:
    return node.all_input_nodes
