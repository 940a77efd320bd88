"""What nodes of a joint graph are given: their arguments by name, and the tensors that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from .timeline import tensor_of


class StatsCall(NamedTuple):
    """The arguments of `row_stats`."""

    z: Node
    labels: list[Node]
    weights: list[Node]
    which: str


class GradCall(NamedTuple):
    """The arguments of `row_grad`."""

    z: Node
    labels: list[Node]
    weights: list[Node]
    m: Node
    coefficients: Node
    which: str


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


def stats_call(node: Node) -> StatsCall:
    return StatsCall(*args_of(node))


def grad_call(node: Node) -> GradCall:
    return GradCall(*args_of(node))


def example_of(node: Node) -> torch.Tensor:
    """The tensor that a node stands for, which has one."""
    example = tensor_of(node)
    assert example is not None, f"{node} is no tensor"
    return example
