"""Returned logits that need not be there: which of a graph's results are promised, made when somebody looks.

The losses of a graph are fused in a scratch copy of it. Where nothing but their statistics and the results
of the graph then has logits, the results that are forms of them are replaced by what they are made of: the
hidden states, a plain differentiable result in their place.

So are those of a linear layer whose loss is not in the graph, but is awaited: of a layer that the user has
deferred, and where Dynamo cuts the program behind the layer, to go on with another graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from ..common.compat.dynamo import is_cut, returns_to_program
from ..common.compat.graphs import is_kept_dynamic
from ..common.findings import name_of, where_is
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import Size, constant, equal, hint, is_hinted, shape_of, tensor_of
from ..graph.timeline import Timeline
from ..reading import spellings
from .find_recipe import Found, NoRecipe, is_form, recipe_of
from .layouts import STATISTICS, other_readers
from .linear_layers import LinearLayer, linear_layer

LAZY = "The logits that are returned are lazy: they are made if somebody reads them."
EAGER = "The logits are returned, so all of them are in memory; they are not lazy because {why}."
INSIDE = "they are returned to other compiled code, not to the program"
DEFERS = "inductor_ce_defers"  # an attribute of the class of a module whose results are to be lazy
FACT = "inductor_ce_returned"  # in a node's meta: what became of logits that are returned


@dataclass(frozen=True)
class Promise:
    """The result at `place` of a graph, as lazy logits of parts, which are inputs or results of the graph.

    `is_shared` says that another result is in the same memory.
    """

    place: int
    found: Found
    is_shared: bool


@dataclass(frozen=True)
class Promised:
    """The promises of a graph, and for each node of logits that are returned what becomes of it."""

    promises: list[Promise]
    facts: dict[Node, str]

    def tell(self) -> None:
        for node, fact in self.facts.items():
            node.meta[FACT] = fact


def promise(graph: Graph, fused: Graph, twins: dict[Node, Node], min_vocab: int) -> Promised:
    """The results of `graph` that are promised; views that their parts need are added to it.

    On an exception the graph is as it was.

    Args:
        graph: as Dynamo captured it.
        fused: a copy of it whose losses are fused.
        twins: the node of the copy for each node of the graph.
        min_vocab: the least number of classes of a layer whose loss is awaited.
    """
    promised = Promised([], {})
    builds: list[Builder] = []
    with undone_on_error(builds):
        statistics = (node for node in fused.nodes if node.target in STATISTICS)
        products = [*map(_products_of, statistics), *((node,) for node in awaited(graph, twins, min_vocab))]
        for of_one in filter(None, dict.fromkeys(products)):
            _promise_of(of_one, graph, twins, promised, builds)
    return promised


def _promise_of(
    products: tuple[Node, ...],
    graph: Graph,
    twins: dict[Node, Node],
    promised: Promised,
    builds: list[Builder],
) -> None:
    """Take in what is promised of the logits that linear layers of the copy make, and why not."""
    results: Any = graph.output_node().args[0]
    fused: Any = products[0].graph.output_node().args[0]
    forms = _forms_of(products)
    places = [i for i, each in enumerate(results) if twins.get(each) in forms or fused[i] in forms]
    if not places:
        return
    returned = {results[i] for i in places}
    own = [node for node in graph.nodes if twins.get(node) in forms or node in returned]
    why = _reader(forms) or ("" if returns_to_program(graph.owning_module) else INSIDE)
    if not why:
        build = Builder(graph, graph.output_node(), like=own[0])
        builds.append(build)
        try:
            timeline = Timeline(graph)
            promised.promises.extend(
                [
                    Promise(i, recipe_of(timeline, results[i], build), _is_shared(timeline, results, i))
                    for i in places
                ]
            )
        except NoRecipe as reason:
            build.undo()
            why = str(reason)
    promised.facts.update(dict.fromkeys(own, EAGER.format(why=why) if why else LAZY))


def awaited(graph: Graph, twins: dict[Node, Node], min_vocab: int) -> list[Node]:
    """The twins of linear layers whose results a loss elsewhere may be made of."""
    cut = is_cut(graph.owning_module)
    return [twins[node] for node in graph.nodes if _is_awaited(node, cut, min_vocab) and node in twins]


def _is_awaited(node: Node, cut: bool, min_vocab: int) -> bool:
    example = tensor_of(node)
    if example is None or not example.dim() or not (_is_deferred(node) or (cut and example.requires_grad)):
        return False
    layer = linear_layer(node, spellings.read(node))
    if layer is None:
        return False
    sizes = shape_of(node)[-1], shape_of(layer.hidden)[-1]
    return hint(sizes[0]) >= min_vocab and all(_is_fixed(layer, size) for size in sizes)


def _is_fixed(layer: LinearLayer, size: Size) -> bool:
    """Whether a size of a layer's weight is a number, for which a guard is added where the weight is learnt.

    Under dynamic=True a weight that is no `Parameter` has sizes of symbols, though they do not change.
    """
    if isinstance(size, int) or constant(size) is not None:
        return True
    if is_kept_dynamic(size) or not is_hinted(size) or not _is_learnt(layer):
        return False
    return int(size) == hint(size)


def _is_learnt(layer: LinearLayer) -> bool:
    """Whether the weight is a leaf of which a gradient is wanted, or a view or a cast of one."""
    node: Any = layer.weight
    while isinstance(node, Node) and node.op not in ("placeholder", "get_attr"):
        spelled = spellings.read(node)
        node = spelled[1].get("input") if spelled is not None and spelled[0].view is not None else None
    example = tensor_of(node)
    return example is not None and example.is_leaf and example.requires_grad


def _is_deferred(node: Node) -> bool:
    """Whether a node is of a module whose class says that its results are to be lazy."""
    *_, (_, kind) = node.meta.get("nn_module_stack", {"": ("", None)}).values()
    return getattr(kind, DEFERS, False)


def _is_shared(timeline: Timeline, results: Any, place: int) -> bool:
    others = (r for r in results if isinstance(r, Node) and r is not results[place])
    return any(timeline.shares_storage(other, results[place]) for other in others)


def _products_of(stats: Node) -> tuple[Node, ...]:
    """The linear layers that make the logits of which statistics are taken: more than one with an adapter."""
    logits = stats.args[0]
    assert isinstance(logits, Node)
    classes = constant(shape_of(logits)[-1])
    found: dict[Node, None] = {}
    waiting = [logits]
    while waiting and classes is not None:
        node = waiting.pop()
        if linear_layer(node, spellings.read(node)) is not None:
            found[node] = None
            continue
        wide = [a for a in node.all_input_nodes if _has_classes(a, node)]
        if len(wide) > 1:  # a bias may have dimensions for the rows too
            wide = [a for a in wide if not all(equal(size, 1) for size in shape_of(a)[:-1])]
        if not wide or not is_form(node, classes):
            return ()
        waiting += wide
    return tuple(sorted(found, key=lambda node: node.name))


def _has_classes(source: Node, node: Node) -> bool:
    """Whether a source has rows of as many classes as those of a node."""
    example = tensor_of(source)
    return example is not None and example.dim() > 1 and shape_of(source)[-1:] == shape_of(node)[-1:]


def _forms_of(products: tuple[Node, ...]) -> set[Node]:
    classes = constant(shape_of(products[0])[-1])
    assert classes is not None
    found = {*products}
    frontier = [*products]
    while frontier:
        fresh = [user for user in frontier.pop().users if user not in found and is_form(user, classes)]
        found.update(fresh)
        frontier += fresh
    return found


def _reader(forms: set[Node]) -> str:
    """Who else reads logits, in words."""
    others = (f"they are also used by {name_of(u)} {where_is(u)}" for u in other_readers(forms))
    return next(others, "")
