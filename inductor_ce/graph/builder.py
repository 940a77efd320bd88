"""Nodes that are added to a graph, with their example values, and taken back if anything fails."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from ..common.compat.graphs import fake_mode_of
from ..common.compat.inductor import decompositions
from .examples import Examples
from .shapes import example_of, same_shape, shape_of, tensor_of


class Builder:
    """Appends nodes with example values at one place of a graph, and can take them all back.

    Args:
        graph, before: where.
        like: a node whose place in the user's code the new ones share; it is a tensor, or is given one.
        key: under which `meta` has the example values.
    """

    def __init__(self, graph: Graph, before: Node, like: Node, key: str = "example_value"):
        self._graph, self._before, self._like, self._key = graph, before, like, key
        examples = filter(lambda x: x is not None, map(tensor_of, (like, *like.all_input_nodes)))
        self._fake_mode = fake_mode_of(next(examples, None))
        self._examples = Examples(self._fake_mode)
        self.created: list[Node] = []

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Call a function, or the Tensor method whose name is given."""
        return self._added(target, args, kwargs, self._examples.of(target, *_examples_of((args, kwargs))))

    def _added(self, target: Any, args: Any, kwargs: Any, example: Any) -> Node:
        with self._graph.inserting_before(self._before):
            op = "call_method" if isinstance(target, str) else "call_function"
            node = self._graph.create_node(op, target, args, kwargs)
        self.created.append(node)
        if "stack_trace" in self._like.meta:
            node.meta["stack_trace"] = self._like.meta["stack_trace"]
        node.meta[self._key] = example
        return node

    def comes_after(self, node: Node) -> bool:
        """Whether new nodes may read a node."""
        return node < self._before

    def of_size(self, size: torch.SymInt) -> tuple[Node, int] | None:
        """(a tensor that new nodes may read, its dimension that has a symbolic size)"""
        for node in itertools.takewhile(self.comes_after, self._graph.nodes):
            for dim, each in enumerate(shape_of(node) if tensor_of(node) is not None else ()):
                if isinstance(each, torch.SymInt) and each.node.expr == size.node.expr:
                    return node, dim
        return None

    def sized_as(self, made: Node, node: Node) -> Node:
        """What was made in place of a node whose number of rows depends on data: its example has as many."""
        example, like = example_of(made), example_of(node)
        if not same_shape(example.shape, like.shape):
            with self._fake_mode, torch.no_grad():
                resized = torch.empty_like(like, dtype=example.dtype)
            made.meta[self._key] = resized.requires_grad_(example.requires_grad)
        return made

    def again(self, node: Node, sources: dict[Node, Node] | Node) -> Node:
        """The operation of `node` on other sources: one for each of its own, or one for all."""
        given = dict.fromkeys(node.all_input_nodes, sources) if isinstance(sources, Node) else sources
        args, kwargs = map_arg((node.args, node.kwargs), given.__getitem__)
        return self(node.target, *args, **kwargs)

    def traced(self, f: Callable[..., torch.Tensor], sources: Sequence[Node]) -> Node:
        """The nodes of f(*sources), in the operators of ATen."""
        with self._fake_mode, torch.no_grad():
            examples = map(tensor_of, sources)
            traced = make_fx(f, decomposition_table=decompositions())(*examples)
        made: dict[Node, Any] = {}
        given = iter(sources)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                made[node] = next(given)
            elif node.op == "output":
                (result,) = node.args
                return made[result]
            else:
                args, kwargs = map_arg((node.args, node.kwargs), made.__getitem__)
                made[node] = self._added(node.target, args, kwargs, node.meta["val"])
        raise AssertionError("a graph without an output")

    def tell_gradients(self, on: bool) -> None:
        """Let the examples of what was built require gradients as the tensors will, where gradients are `on`.

        Examples are made without, and what is read of a graph asks them.
        """
        for node in self.created:
            example = tensor_of(node)
            if example is None or not example.is_floating_point():
                continue
            sources = [each for source in node.all_input_nodes if (each := tensor_of(source)) is not None]
            wanted = on and any(each.requires_grad for each in sources)
            if example.requires_grad != wanted:
                node.meta[self._key] = example.detach().requires_grad_(wanted)

    def undo(self) -> None:
        """Take back all that was built, which nothing else reads yet."""
        for node in reversed(self.created):
            self._graph.erase_node(node)
        self.created.clear()


@contextlib.contextmanager
def undone_on_error(builds: Sequence[Builder]) -> Iterator[None]:
    """Take back all that is built, the last first, where the block raises. Within it `builds` may grow."""
    try:
        yield
    except Exception:
        for build in reversed(builds):
            build.undo()
        raise


def _examples_of(given: Any) -> Any:
    return map_arg(given, lambda node: node.meta.get("example_value", node.meta.get("val")))
