"""Lazy logits that enter a compiled function: taken apart, their linear layer and chain put behind the parts.

Dynamo takes the class as one input of a graph, as it can be flattened. In a copy of the graph that input
becomes inputs for the parts, so that the loss has its head and is recognised as if both had been compiled
together.

NOTE Edits. A graph that edits such an input edits what the parts make of it. What that has become is one more
result, which is copied to the lazy logits: so the program sees the edit, and its gradient.

NOTE Views. What a graph returns in the memory of such an input is no result of it: the views are taken of the
lazy logits when it has run (`lazy_views`). So whoever edits one of them edits all.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..common.compat.dynamo import attribute_source, input_source, moved_facts
from ..common.compat.graphs import (
    fake_mode_of,
    is_dtensor,
    is_kept_dynamic,
    local_of,
    set_local,
    tree_leaves,
    tree_map,
)
from ..common.errors import LazyLogitsError
from ..common.findings import name_of
from ..graph.builder import Builder
from ..graph.examples import Examples
from ..graph.shapes import example_of
from ..graph.timeline import Timeline
from .lazy_logits import LazyLogits
from .lazy_source import Source
from .lazy_trees import memory_of
from .lazy_views import Views, place_of, views_of

SHARED = (
    "Logits that were returned lazily are edited in a compiled function that is given others in their "
    'memory. Use the option returned_logits="eager".'
)
LAID_OUT = (
    "A compiled function returns rows of logits that were returned lazily, by something else than views. "
    'Use the option returned_logits="eager".'
)


@dataclass(frozen=True)
class Apart:
    """How arguments of a graph are taken apart, and what becomes of its results.

    Attributes:
        added: for each argument the places of the parts that stand for it; None where it is given as it is.
        edited: the places of the other arguments that the graph edits.
        written: the places of the lazy logits that it edits: what these become are results.
        lost: the places of lazy logits that are given whole, as results are in their memory.
        views: what is taken of the arguments in place of results.
    """

    added: tuple[tuple[int, ...] | None, ...]
    edited: tuple[int, ...]
    written: tuple[int, ...]
    lost: tuple[int, ...]
    views: Views

    def flattened(self, arguments: Sequence[Any]) -> list[Any]:
        """The arguments, of lazy logits the parts that were added.

        Raises LazyLogitsError where others are in the memory of those that are written to.
        """
        self._check(arguments)
        flat: list[Any] = []
        for i, (argument, added) in enumerate(zip(arguments, self.added, strict=True)):
            if added is not None and isinstance(argument, LazyLogits):
                argument.source.check()
                if torch.is_grad_enabled() and argument.requires_grad:
                    argument.go_round()
                flat += _parts(argument.source, added, [arguments[i] for i in self.edited])
            else:
                flat.append(self._whole(i, argument))
        return flat

    def _whole(self, i: int, argument: Any) -> Any:
        """An argument as it is given to the graph, not lazy: in the memory of what it is a view of, where
        somebody may write there."""
        lazy = _lazy_of(argument)
        if lazy is not None and i in self.edited:
            lazy.before_write()
        if i in self.lost:
            argument.join()
            if not argument.made().is_contiguous():
                raise LazyLogitsError(LAID_OUT)
        return _plain(argument)

    def _check(self, arguments: Sequence[Any]) -> None:
        places = [_place(x) for x in arguments] if self.edited or self.written else []
        for i in (*self.edited, *self.written):
            for j, other in enumerate(places):
                if i != j and other is not None and other == places[i] and not self._sees(i, j):
                    raise LazyLogitsError(SHARED)

    def _sees(self, edited: int, other: int) -> bool:
        """Whether what is compiled knows by itself that arguments are in one place."""
        return self.added[edited] is None and self.added[other] is None

    def finished(self, arguments: Sequence[Any], results: Sequence[Any]) -> Sequence[Any]:
        """The results of the program, of those of the graph."""
        read = len(results) - self.views.count
        kept = read - len(self.written)
        for i, became in zip(self.written, results[kept:read], strict=True):
            arguments[i].copy_(became)
        return self.views.taken(arguments, results[:kept], results[read:])


def _place(x: Any) -> Any:
    """What tells the memory of an argument from that of others, as it is or will be."""
    lazy = _lazy_of(x)
    return place_of(x if lazy is None else lazy)


def taken_apart(module: GraphModule, inputs: Sequence[Any]) -> tuple[GraphModule, list[Any], Apart | None]:
    """(the graph, its inputs, how arguments are taken apart) with parts in place of lazy logits.

    The last is None where there are none: then nothing is copied.
    """
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    examples = [node.meta.get("example_value") for node in places]
    if all(_lazy_of(value) is None for value in (*inputs, *examples)):
        return module, list(inputs), None
    timeline = Timeline(module.graph)
    lazy = [node for node, value in zip(places, examples, strict=True) if isinstance(value, LazyLogits)]
    views, lost = views_of(timeline, lazy)
    module, twins = copied_module(module)
    replaced = _replaced(module.graph, [node for node in lazy if node not in lost], places, twins)
    changed = [i for i, node in enumerate(places) if timeline.edits(node)]
    apart = Apart(
        added=tuple(replaced[node].added if node in replaced else None for node in places),
        edited=tuple(i for i in changed if places[i] not in replaced),
        written=tuple(i for i in changed if places[i] in replaced),
        lost=tuple(i for i, node in enumerate(places) if node in lost),
        views=views,
    )
    given = _given(apart, inputs, examples)
    for node in module.graph.nodes:
        if "example_value" in node.meta:
            node.meta["example_value"] = tree_map(_plain, node.meta["example_value"])
    became = [replaced[places[i]].made for i in apart.written]
    for i, made in zip(apart.written, became, strict=True):
        _remake_aliases(timeline, places[i], twins, made)
    for place in replaced:
        _copy_cut_rows(timeline, place, twins)
    views.leave(module.graph, twins, became)
    module.recompile()
    return module, given, apart


def _given(apart: Apart, inputs: Sequence[Any], examples: Sequence[Any]) -> list[Any]:
    """What the compiler is given for the inputs of a graph, of which Dynamo knows these examples."""
    edited = [inputs[i] for i in apart.edited]
    given: list[Any] = []
    for i, (value, example, added) in enumerate(zip(inputs, examples, apart.added, strict=True)):
        if added is not None:
            source = value.source if isinstance(value, LazyLogits) else example.source
            given += _parts(source, added, edited)
        else:
            value = example if i in apart.lost else value  # of whose logits the compiler knows the sizes
            given.append(value.made() if isinstance(value, LazyLogits) else value)
    return given


def _copy_cut_rows(timeline: Timeline, place: Node, twins: dict[Node, Node]) -> None:
    """Let what copies lazy logits that are not contiguous do so where what is made in their stead is.

    It matters where one of the two is edited.
    """
    logits = example_of(place)
    for node in timeline.nodes if not logits.is_contiguous() else ():
        if name_of(node) in _COPY_WHAT_IS_CUT and (timeline.edits(node) or timeline.edits(place)):
            of = node.all_input_nodes[0]
            same = [place_of(logits) == place_of(each.meta.get("example_value")) for each in (of, node)]
            if same == [True, False]:
                twins[node] = _cloned(twins[node])


def _cloned(node: Node) -> Node:
    """A copy of what a node gives, which all its users have."""
    users = list(node.users)
    with node.graph.inserting_after(node):
        copy = node.graph.call_method("clone", (node,))
    copy.meta = dict(node.meta)
    for user in users:
        user.replace_input_with(node, copy)
    return copy


_COPY_WHAT_IS_CUT = {"contiguous", "reshape", "reshape_as", "flatten", "ravel"}


def _remake_aliases(timeline: Timeline, place: Node, twins: dict[Node, Node], made: Node) -> None:
    """Let what is in the memory of an input be, by its example, in that of what is made in its stead."""
    storage, examples = timeline.storage(place), Examples(fake_mode_of(example_of(made)))
    for node in timeline.nodes:
        value = node.meta.get("example_value")
        old = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] if node is not place else []
        if not any(timeline.storage_of(leaf, node) == storage for leaf in old):
            continue
        twin, has_gradient = twins[node], any(leaf.requires_grad for leaf in old)
        given = map_arg((twin.args, twin.kwargs), lambda source: source.meta["example_value"])
        result = examples.of(twin.target, *given)
        twin.meta["example_value"] = tree_map(functools.partial(_alias, has_gradient), result)


def _alias(has_gradient: bool, value: Any) -> Any:
    return value.detach().requires_grad_(has_gradient) if isinstance(value, Tensor) else value


def _lazy_of(value: Any) -> LazyLogits | None:
    """The lazy logits that a value is, or those of this rank in a DTensor."""
    return value if isinstance(value, LazyLogits) else _lazy_part(value)


def _lazy_part(value: Any) -> LazyLogits | None:
    """The lazy logits of this rank in a DTensor."""
    local = local_of(value) if is_dtensor(value) else None
    return local if isinstance(local, LazyLogits) else None


def _plain(value: Any) -> Any:
    """The same logits, not lazy."""
    if isinstance(value, LazyLogits):
        return value.made()
    local = _lazy_part(value)
    if local is not None:  # it stays the same DTensor, whose gradient is known, and which AOTAutograd knows
        set_local(value, local.made())
    return value


@contextlib.contextmanager
def made_inside(inputs: Sequence[Any]) -> Iterator[None]:
    """Within, DTensors of lazy logits are what a compiled function is given when it runs.

    For Dynamo, which is about to guard them, they are again what it saw.
    """
    found = {i: _lazy_part(x) for i, x in enumerate(inputs)}
    lazy = {i: local for i, local in found.items() if local is not None}
    for i, local in lazy.items():
        set_local(inputs[i], local.made())
    try:
        yield
    finally:
        for i, local in lazy.items():
            set_local(inputs[i], local)


class _Replaced(NamedTuple):
    """An input that parts stand for: those that were added, by their places, and what makes it of them."""

    added: tuple[int, ...]
    made: Node


def _replaced(
    graph: Graph, lazy: Sequence[Node], places: Sequence[Node], twins: dict[Node, Node]
) -> dict[Node, _Replaced]:
    """Replace inputs that are `lazy`, of all at `places`, by their parts; each in the graph by its twin.

    Hidden states, or a weight, that the graph reads too are an input already: Dynamo takes them from the
    logits, of which it looked at the parts. They are `there`, by where Dynamo takes them from.
    """
    there = {input_source(node): twins[node] for node in places}
    behind = twins[places[-1]].next
    return {node: _replaced_by_parts(graph, twins[node], behind, there) for node in lazy}


def _replaced_by_parts(graph: Graph, node: Node, behind: Node, there: dict[Any, Node]) -> _Replaced:
    """Replace an input by its parts, and what makes it of them before the node `behind`."""
    example: LazyLogits = node.meta["example_value"]
    source, added = example.source, []
    _fix_hidden_size(source.parts[0])
    parts = []
    for i, of_example in enumerate(source.parts):
        name = f"_part{i}"
        origin = attribute_source(node, name)
        if origin not in there:
            with graph.inserting_before(node):
                there[origin] = graph.placeholder(f"{node.name}{name}")
            there[origin]._dynamo_source = origin
            meta = {k: v for k, v in node.meta.items() if k not in ("example_value", "grapharg")}
            there[origin].meta = {**meta, "example_value": of_example}
            added.append(i)
        parts.append(there[origin])
    build = Builder(graph, behind, like=parts[0])
    made = source.recipe.nodes(build, parts)
    node.replace_all_uses_with(made)
    build.tell_gradients(example.requires_grad)
    graph.erase_node(node)
    return _Replaced(tuple(added), made)


def _fix_hidden_size(hidden: Tensor) -> None:
    """Under dynamic=True let it be a number, as a weight has one hidden size: a guard is added."""
    size = hidden.shape[-1]
    if not isinstance(size, int) and not is_kept_dynamic(size):
        int(size)


def _parts(source: Source, added: tuple[int, ...], edited: Sequence[Any]) -> list[Tensor]:
    """Some parts; copies of those that are in the memory of what the graph edits, as they are before that.

    AOTAutograd wants no input twice that is edited, and Inductor may edit one while another is still read.
    """
    places = {memory_of(x) for x in edited if isinstance(x, Tensor) and not isinstance(x, LazyLogits)}
    parts = [source.parts[i] for i in added]
    return [p.clone() if memory_of(p) in places else p for p in parts]


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
