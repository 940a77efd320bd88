"""Lazy logits that enter a compiled function: taken apart, their linear layer and chain put behind the parts.

Dynamo takes the class as one input of a graph, as it can be flattened. In a copy of the graph that input
becomes inputs for the parts, so that the loss has its head and is recognised as if both had been compiled
together.

NOTE Edits. A graph that edits such an input edits what the parts make of it. What that has become is one more
result, which is copied to the lazy logits: so the program sees the edit, and its gradient.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
from ..graph.builder import Builder
from ..graph.examples import Examples
from ..graph.shapes import example_of
from ..graph.timeline import Timeline
from .lazy_logits import LazyLogits
from .lazy_source import Source

Flatten = Callable[[Sequence[Any]], list[Any]]

SHARED = (
    "Logits that were returned lazily are edited in a compiled function that is given others in their "
    'memory. Use the option returned_logits="eager".'
)


def taken_apart(
    module: GraphModule, inputs: Sequence[Any]
) -> tuple[GraphModule, list[Any], Flatten | None, tuple[int, ...]]:
    """(the graph, its inputs, what arguments are put through) with parts in place of lazy logits.

    And which of the inputs, as they were, the graph edits: what these become are its last results.
    """
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    lazy = [isinstance(node.meta.get("example_value"), LazyLogits) for node in places]
    if not any(lazy) and not any(map(_is_lazy, [*inputs, *(n.meta.get("example_value") for n in places)])):
        return module, list(inputs), None, ()
    timeline = Timeline(module.graph)
    edited = tuple(i for i, node in enumerate(places) if not lazy[i] and timeline.edits(node))
    written = tuple(i for i, node in enumerate(places) if lazy[i] and timeline.edits(node))
    became = []
    module, twins = copied_module(module)
    examples: list[Any] = []
    apart: list[tuple[int, ...] | None] = []
    behind = twins[places[-1]].next
    there = {input_source(node): twins[node] for node in places}
    for i, (node, is_lazy, given) in enumerate(zip(places, lazy, inputs, strict=True)):
        example = node.meta.get("example_value")
        if is_lazy:
            added, made = _apart(module.graph, twins[node], example, behind, there)
            became += [made] if i in written else []
            source = given.source if isinstance(given, LazyLogits) else example.source
            examples += _parts(source, added, [inputs[e] for e in edited])
            apart.append(added)
        else:
            apart.append(None)
            examples.append(given.made() if isinstance(given, LazyLogits) else given)
    output = module.graph.output_node()
    output.args = ((*output.args[0], *became),)  # type: ignore[misc]
    for node in module.graph.nodes:
        if "example_value" in node.meta:
            node.meta["example_value"] = tree_map(_plain, node.meta["example_value"])
    for i, made in zip(written, became, strict=True):
        _remake_aliases(timeline, places[i], twins, made)
    module.recompile()
    return module, examples, functools.partial(_flattened, tuple(apart), edited, written), written


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


def _is_lazy(value: Any) -> bool:
    return isinstance(value, LazyLogits) or _lazy_part(value) is not None


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


def _apart(
    graph: Graph, node: Node, example: LazyLogits, behind: Node, there: dict[Any, Node]
) -> tuple[tuple[int, ...], Node]:
    """Replace an input by its parts, and what makes it before the node `behind`.

    Returns the parts added, and what stands for the input.

    Hidden states, or a weight, that the graph reads too are an input already: Dynamo takes them from the
    logits, of which it looked at the parts. They are `there`, by where Dynamo takes them from.
    """
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
    return tuple(added), made


def _fix_hidden_size(hidden: Tensor) -> None:
    """Under dynamic=True let it be a number, as a weight has one hidden size: a guard is added."""
    size = hidden.shape[-1]
    if not isinstance(size, int) and not is_kept_dynamic(size):
        int(size)


def _parts(source: Source, added: tuple[int, ...], edited: Sequence[Any]) -> list[Tensor]:
    """Some parts; copies of those that are in the memory of what the graph edits, as they are before that.

    AOTAutograd wants no input twice that is edited, and Inductor may edit one while another is still read.
    """
    places = {local_of(x).untyped_storage()._cdata for x in edited if isinstance(x, Tensor)}
    parts = [source.parts[i] for i in added]
    return [p.clone() if local_of(p).untyped_storage()._cdata in places else p for p in parts]


def _flattened(
    apart: tuple[tuple[int, ...] | None, ...],
    edited: tuple[int, ...],
    written: tuple[int, ...],
    arguments: Sequence[Any],
) -> list[Any]:
    """The arguments, of lazy logits the parts that were added.

    Raises LazyLogitsError where others are in the memory of those that are written to.
    """
    roots = [id(x.root) if isinstance(x, LazyLogits) else None for x in arguments]
    if any(roots.count(roots[i]) > 1 for i in written):
        raise LazyLogitsError(SHARED)
    flat: list[Any] = []
    for argument, added in zip(arguments, apart, strict=True):
        if added is not None and isinstance(argument, LazyLogits):
            argument.source.check()
            flat += _parts(argument.source, added, [arguments[i] for i in edited])
        else:
            flat.append(_plain(argument))
    return flat


def write_back(written: tuple[int, ...], arguments: Sequence[Any], results: Sequence[Any]) -> Sequence[Any]:
    """The results of a graph without what its edited inputs became, which is copied to these."""
    if not written:
        return results
    kept = len(results) - len(written)
    for i, became in zip(written, results[kept:], strict=True):
        arguments[i].copy_(became)
    return results[:kept]


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
