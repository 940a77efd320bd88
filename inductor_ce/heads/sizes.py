"""Symbolic sizes of a graph, as arithmetic of the sizes of its inputs.

A size may be read off any tensor, also off one that is not to be computed, or not so early. Nothing but the
inputs need be there for a size.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from ..graph.shapes import tensor_of

aten = torch.ops.aten

READERS = (
    *(aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int, aten.sym_storage_offset.default),
)

_FUNCTIONS = {"FloorDiv": operator.floordiv, "Mod": operator.mod, "PythonMod": operator.mod}


def from_inputs(graph: Graph) -> None:
    """Let sizes be computed from inputs, where they can be, and remove what nothing else is read of."""
    readers = [
        node
        for target in READERS
        for node in graph.find_nodes(op="call_function", target=target)
        if node.args[0].op != "placeholder"
    ]
    if not readers:
        return
    with _behind_inputs(graph):
        sizes = _Sizes(graph)
        for node in readers:
            size = sizes.of(node.meta["val"])
            if size is not None:
                node.replace_all_uses_with(size)
    graph.eliminate_dead_code()


def of_shape(graph: Graph, shape: Sequence[Any]) -> list[Any] | None:
    """A shape as numbers and nodes; None where one of its sizes is no arithmetic of the inputs' sizes."""
    with _behind_inputs(graph):
        sizes = _Sizes(graph)
        made = [sizes.of(size) for size in shape]
    return None if None in made else made


def _behind_inputs(graph: Graph) -> AbstractContextManager[Any]:
    *_, last = (node for node in graph.nodes if node.op == "placeholder")
    return graph.inserting_before(last.next)


class _Sizes:
    """Nodes for expressions of symbols."""

    def __init__(self, graph: Graph):
        self._graph = graph
        self._known: dict[sympy.Expr, Any] = {}
        inputs = graph.find_nodes(op="placeholder")
        for node in inputs:
            self._note(node, node.meta.get("val"))
        for node in inputs:
            for dim, size in enumerate(tensor.shape if (tensor := tensor_of(node)) is not None else ()):
                self._note((node, dim), size)

    def _note(self, source: Any, size: Any) -> None:
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            self._known.setdefault(size.node.expr, (source, size))

    def of(self, size: Any) -> Any:
        """A number, a node, or None where a size is no arithmetic of the inputs' sizes."""
        if not isinstance(size, torch.SymInt):
            return size
        made = self._made(size.node.expr)
        return None if made is None else made[0]

    def _made(self, expr: sympy.Expr) -> tuple[Any, Any] | None:
        """(node or number, its value)"""
        if expr.is_Integer:
            return int(expr), int(expr)
        if expr not in self._known:
            self._known[expr] = self._combined(expr)
        made = self._known[expr]
        if made is not None and isinstance(made[0], tuple):
            (tensor, dim), value = made
            made = self._known[expr] = self._node(aten.sym_size.int, (tensor, dim), value)
        return made

    def _combined(self, expr: sympy.Expr) -> tuple[Any, Any] | None:
        if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
            expr = sympy.Mul(*[expr.base] * int(expr.exp), evaluate=False)
        known = {sympy.Add: operator.add, sympy.Mul: operator.mul}
        combine = known.get(expr.func, _FUNCTIONS.get(expr.func.__name__))
        parts = [part for part in map(self._made, expr.args) if part is not None]
        if combine is None or not parts or len(parts) < len(expr.args):
            return None
        return functools.reduce(lambda a, b: self._node(combine, (a[0], b[0]), combine(a[1], b[1])), parts)

    def _node(self, target: Any, args: tuple[Any, ...], value: Any) -> tuple[Node, Any]:
        node = self._graph.call_function(target, args)
        node.meta["val"] = value
        return node, value
