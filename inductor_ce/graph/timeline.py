"""When a torch-level graph, which is not functional, changes what its names mean.

Nodes run in graph order. An in-place operation changes a storage, and with it every view of that storage;
`torch.no_grad`, `inference_mode` and autocast blocks switch their modes on and off. A Timeline answers, for
any place between two nodes: which version of a storage is read here, and under which modes?
"""

from __future__ import annotations

import functools
import inspect
import operator
from bisect import bisect_left
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from ..common.compat.graphs import (
    autocast_switches,
    enter_inference_mode,
    exit_inference_mode,
    is_higher_order,
    local_of,
    set_grad_enabled,
)
from .shapes import tensor_of

Mode = bool | str
INFERENCE = "inference"

_INPLACE_OPERATORS = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
    *(operator.imatmul, operator.setitem, operator.delitem),
}
_INPLACE_METHODS = {f"__{function.__name__}__" for function in _INPLACE_OPERATORS}
# Named so because Python has keywords of their names.
_NOT_INPLACE = {operator.and_, operator.or_, operator.not_, operator.is_}


def written_by(node: Node) -> Iterator[Node]:
    """The arguments that `node` changes in place."""
    if node.op == "call_method":
        if _is_inplace_method(str(node.target)):
            yield from _nodes(node.args[:1])
    elif node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        name = getattr(node.target, "__name__", "")
        if is_higher_order(node.target):
            yield from node.all_input_nodes if _writes_inside(node) else ()
        elif schema is not None:
            yield from _written_by_schema(node, schema)
        elif node.target in _NOT_INPLACE:
            return
        elif node.target in _INPLACE_OPERATORS or _is_inplace_method(name):
            yield from _nodes(node.args[:1])
        elif _asked_inplace(node):
            yield from _nodes(node.args[:1] or tuple(node.kwargs.values())[:1])
    yield from _nodes((node.kwargs.get("out"),))


def _is_inplace_method(name: str) -> bool:
    return name in _INPLACE_METHODS or (name.endswith("_") and not name.endswith("__"))


def _writes_inside(node: Node) -> bool:
    """Whether a higher-order operator writes: its name says so, or a graph does to what that is given."""
    bodies = [n for n in node.all_input_nodes if n.op == "get_attr"]
    if not bodies:
        return "mutation" in str(node.target)
    modules = dict(node.graph.owning_module.named_modules()) if node.graph.owning_module else {}
    graphs = [getattr(modules.get(str(body.target)), "graph", None) for body in bodies]
    return any(graph is None or _writes_given(graph) for graph in graphs)


def _writes_given(graph: Graph) -> bool:
    """Whether a graph writes to anything but tensors that it has made."""
    given = {Timeline.storage(node) for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    written = [each for node in graph.nodes for each in written_by(node)]
    return any(tensor_of(each) is None or Timeline.storage(each) in given for each in written)


def _nodes(args: tuple[object, ...]) -> Iterator[Node]:
    for arg in args:
        if isinstance(arg, Node):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _nodes(tuple(arg))


def _written_by_schema(node: Node, schema: Any) -> Iterator[Node]:
    for position, parameter in enumerate(schema.arguments):
        if parameter.alias_info is not None and parameter.alias_info.is_write and parameter.name != "out":
            given = node.args[position] if position < len(node.args) else node.kwargs.get(parameter.name)
            yield from _nodes((given,))


def _asked_inplace(node: Node) -> bool:
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    place = _place_of_inplace(node.target) if inspect.isfunction(node.target) else None
    return place is not None and place < len(node.args) and node.args[place] is True


@functools.lru_cache(maxsize=1024)
def _place_of_inplace(function: Any) -> int | None:
    """Which parameter of a function is `inplace`, if it has one."""
    names = list(inspect.signature(function).parameters)
    return names.index("inplace") if "inplace" in names else None


class Timeline:
    """Positions of nodes, versions of storages and the gradient mode, over one graph."""

    def __init__(self, graph: Graph):
        self.nodes = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self._writes: dict[Hashable, list[int]] = {}
        self._switches: list[int] = []
        self._autocasts: list[int] = []
        self._modes: list[Mode] = [torch.is_grad_enabled()]
        outside: list[Mode] = []
        for i, node in enumerate(self.nodes):
            for written in written_by(node):
                self._writes.setdefault(self.storage(written), []).append(i)
            if node.target is set_grad_enabled:
                self._switch(i, bool(node.args[0]))
            elif node.target is enter_inference_mode:
                outside.append(self._modes[-1])
                self._switch(i, INFERENCE if node.args[0] else self._modes[-1])
            elif node.target is exit_inference_mode:
                self._switch(i, outside.pop())
            elif node.target in autocast_switches:
                self._autocasts.append(i)

    def _switch(self, position: int, mode: Mode) -> None:
        self._switches.append(position)
        self._modes.append(mode)

    @staticmethod
    def storage(node: Node) -> Hashable:
        """What tells the storage of a node from others."""
        value = tensor_of(node)
        return node if value is None else Timeline.storage_of(value, node)

    @staticmethod
    def storage_of(value: torch.Tensor, node: Node) -> Hashable:
        """The same of a tensor that a node has."""
        try:
            return local_of(value).untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):  # a tensor without storage aliases nothing that we follow
            return node

    def shares_storage(self, a: Node, b: Node) -> bool:
        return self.storage(a) == self.storage(b)

    def version(self, node: Node, position: int) -> int:
        """How often the storage of `node` was written before `position`."""
        return bisect_left(self._writes.get(self.storage(node), []), position)

    def unchanged(self, node: Node, since: Node | int, until: int | None = None) -> bool:
        """Whether the storage of `node` is the same at `until` as just after the node `since`.

        By default `until` is the end of the graph.
        """
        start = since if isinstance(since, int) else self.position[since] + 1
        end = len(self.nodes) if until is None else until
        return self.version(node, start) == self.version(node, end)

    def sources(self, node: Node) -> list[Node]:
        """What a node is given, and what edits its storage, at any time."""
        return [*node.all_input_nodes, *self.edits(node)]

    def edits(self, node: Node) -> list[Node]:
        """What edits the storage of a node, at any time."""
        return [self.nodes[i] for i in self._writes.get(self.storage(node), ())]

    def as_edited(self, node: Node) -> list[Node]:
        """A node, and what shares its storage where that is edited: an edit may bring a gradient."""
        if self.storage(node) not in self._writes:
            return [node]
        return [each for each in self.nodes if self.shares_storage(each, node)]

    def window(self, node: Node, position: int) -> tuple[int, int]:
        """The places (first, last) where `node` exists and reads as it does at `position`."""
        writes = self._writes.get(self.storage(node), [])
        version = bisect_left(writes, position)
        first = writes[version - 1] + 1 if version else 0
        last = writes[version] if version < len(writes) else len(self.nodes) - 1
        return max(first, self.position[node] + 1), last

    def _at(self, place: Node | int) -> int:
        return place if isinstance(place, int) else self.position[place]

    def grad_mode(self, place: Node | int) -> Mode:
        """Whether gradients are on at a node, or a position; or INFERENCE."""
        return self._modes[bisect_left(self._switches, self._at(place))]

    def calm_since(self, position: int) -> int:
        """The first place from which to `position` no mode is switched."""
        before = [
            switches[i - 1] + 1
            for switches in (self._switches, self._autocasts)
            if (i := bisect_left(switches, position))
        ]
        return max(before, default=0)

    def has_autocast(self, place: Node | int) -> bool:
        """Whether an autocast region may hold a node, or a position."""
        return bool(self._autocasts) and self._autocasts[0] < self._at(place)

    def same_autocast(self, a: Node | int, b: Node | int) -> bool:
        """Whether no autocast region begins or ends between two nodes, or positions."""
        return bisect_left(self._autocasts, self._at(a)) == bisect_left(self._autocasts, self._at(b))
