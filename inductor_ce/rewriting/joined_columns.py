"""Columns put beside logits: statistics of cat([e, z], -1) are those of e and of z, combined.

A margin, a column of zeros, the positive in front of a queue of negatives: the concatenation would have all
logits in memory once more, and hide the linear layer that makes most of them from the heads. The parts are
blocks of columns as those of ranks and slabs are, so one law makes the whole rows of them, before any
logarithm. Labels count from the first column of each part; whoever falls outside a part picks nothing there.
Each part has its own gradient. Only where nothing else reads the concatenation.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .. import ops
from ..common.compat.graphs import is_plain_tensor
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import equal, example_of, shape_of, tensor_of
from ..graph.timeline import Timeline, written_by
from ..ops.combine import chosen, combined, own_rows
from ..ops.rows import Rows
from ..reading import spellings
from ..reading.steps import Step
from .find_recipe import is_sized_view, with_width
from .linear_layers import logit_classes
from .rewrite import SIZES, want_gradients_as

# A sweep for each: beyond this few, as where many columns are stacked one by one, the copy is the better.
MAX_PARTS = 4


@dataclass(frozen=True)
class Joined:
    """Logits that are a concatenation along the classes, and what is done to all of them since.

    Attributes:
        node: the concatenation.
        parts: what it is of, in order, each with its number of columns.
        links: views and functions of each element, also in place, first to last.
        stats: the `row_stats` of the last.
    """

    node: Node
    parts: tuple[tuple[Node, int], ...]
    links: tuple[Node, ...]
    stats: tuple[Node, ...]

    @property
    def classes(self) -> int:
        return sum(size for _, size in self.parts)

    @property
    def widest(self) -> int:
        """The part that has most columns, by its place."""
        sizes = [size for _, size in self.parts]
        return sizes.index(max(sizes))

    def start(self, index: int) -> int:
        """The first column of a part."""
        return sum(size for _, size in self.parts[:index])


def split_columns(graph: Graph) -> dict[Node, Node]:
    """Take statistics of what was concatenated, where statistics are taken of a concatenation.

    Returns the widest of the parts for each node that held all columns and is no more.
    """
    timeline: Timeline | None = None
    gone: dict[Node, Node] = {}
    for stats in graph.find_nodes(op="call_function", target=ops.ROW_STATS):
        made = _concatenation(stats.args[0])
        if made is not None and stats.users:
            timeline = timeline or Timeline(graph)
            joined = _joined(timeline, made, stats)
            if _may_split(timeline, joined):
                gone |= dict.fromkeys([joined.node, *joined.links], _split(graph, joined))
                timeline = None
    return gone


def _concatenation(node: Any) -> Node | None:
    """The concatenation at the root of what are links, as far as can be told without places."""
    while isinstance(node, Node) and not _is_joined(node):
        node = _source_of_link(node)
    return node if isinstance(node, Node) else None


def _is_joined(node: Node) -> bool:
    return bool(_parts(node))


def _parts(node: Node) -> tuple[tuple[Node, int], ...]:
    """The tensors that a node puts side by side along the classes, with their columns."""
    spelled = spellings.read(node)
    if spelled is None or spelled[0].name != "cat":
        return ()
    tensors, dim, rank = spelled[1].get("tensors"), spelled[1].get("dim", 0), len(shape_of(node))
    if not isinstance(tensors, (list, tuple)) or not isinstance(dim, int) or dim % rank != rank - 1:
        return ()
    if rank < 2 or not 1 < len(tensors) <= MAX_PARTS or not is_plain_tensor(example_of(node)):
        return ()
    sizes = [logit_classes(t) for t in tensors]
    if None in sizes or 0 in sizes or logit_classes(node) is None:
        return ()
    return tuple(zip(tensors, sizes, strict=True))  # type: ignore[arg-type]


def _source_of_link(node: Node) -> Node | None:
    """What a node is a view or a function of each element of, the classes last in both."""
    step = spellings.step_of(node)
    if step is None or logit_classes(node) is None or not _is_of_each(node, step):
        return None
    wide = [a for a in node.all_input_nodes if logit_classes(a) == logit_classes(node)]
    return wide[0] if len(wide) == 1 and node.args[:1] == (wide[0],) else None


def _is_of_each(node: Node, step: Step) -> bool:
    """Whether a node arranges rows otherwise, or computes each element of one source by itself."""
    return is_sized_view(node) or step.in_chain or spellings.is_arithmetic_edit(node)


def _joined(timeline: Timeline, node: Node, stats: Node) -> Joined:
    """The concatenation that the logits of `stats` are of, and the links that lie between."""
    links: list[Node] = []
    reader, source = stats, stats.args[0]
    while isinstance(source, Node):
        links[:0] = _edits(timeline, source, reader)
        if source is node:
            break
        links.insert(0, source)
        reader, source = links[0], _source_of_link(source)
    last = stats.args[0]
    assert isinstance(last, Node)
    others = tuple(user for user in last.users if user.target == ops.ROW_STATS and user.args[0] is last)
    return Joined(node, _parts(node), tuple(links), others)


def _edits(timeline: Timeline, node: Node, reader: Node) -> list[Node]:
    """What changes a node in place before it is read by another, and is not itself what is read then."""
    position, found = timeline.position, [node]
    for alias in found:
        found += [u for u in alias.users if alias in written_by(u) and position[u] < position[reader]]
    return sorted(found[1:], key=position.__getitem__)


def _may_split(timeline: Timeline, joined: Joined) -> bool:
    """Whether nobody else needs the concatenation, and all parts read where they are due as they were."""
    chain, position = [joined.node, *joined.links], timeline.position
    due = min(map(position.__getitem__, joined.stats))
    readers = {*chain, *joined.stats}
    if any(user not in readers and not _reads_shape(user) for node in chain for user in node.users):
        return False
    if any(_source_of_link(link) not in chain for link in joined.links):
        return False
    if any(stats.args[0] is not joined.stats[0].args[0] for stats in joined.stats):
        return False
    if not all(map(_may_be_of_parts, joined.stats)):
        return False
    if len({timeline.grad_mode(node) for node in readers}) > 1:
        return False
    first = position[joined.links[0]] if joined.links else due
    if not all(timeline.unchanged(part, joined.node, first) for part, _ in joined.parts):
        return False
    return _nothing_else_writes(timeline, joined)


def _nothing_else_writes(timeline: Timeline, joined: Joined) -> bool:
    """Whether all that changes the logits in place before they are read is among the links."""
    chain, position = [joined.node, *joined.links], timeline.position
    last = [(chain[-1], stats) for stats in joined.stats]
    pairs = [*itertools.pairwise(chain), *last]
    return all(timeline.unchanged(node, node, position[reader]) for node, reader in pairs)


def _reads_shape(node: Node) -> bool:
    """Whether a node reads how many rows there are, itself or by way of one column of all."""
    source = node.args[0] if node.args else None
    if tensor_of(source) is None:
        return False
    rank: int = len(shape_of(source))  # type: ignore[arg-type]
    dim = node.args[1] if len(node.args) > 1 else None
    if not isinstance(dim, int):
        return False
    if spellings.is_step(node, "select"):
        first = dim % rank == rank - 1 and node.args[2] == 0
        return bool(first) and all(map(spellings.reads_shapes, node.users))
    return node.target in SIZES and bool(dim % rank < rank - 1)


def _may_be_of_parts(stats: Node) -> bool:
    """Whether the rows of a `row_stats` combine, and its weights can be cut without a copy."""
    _, weights = _labels_and_weights(stats)
    return not _rows(stats).told and all(len(shape_of(q)) == 1 for q in weights)


def _rows(stats: Node) -> Rows:
    labels, weights = _labels_and_weights(stats)
    return Rows.decode(str(stats.args[3]), len(labels), len(weights))


def _labels_and_weights(stats: Node) -> tuple[list[Node], list[Node]]:
    _, labels, weights, _ = stats.args
    return list(labels), list(weights)  # type: ignore[arg-type]


# Taking it apart


def _split(graph: Graph, joined: Joined) -> Node:
    """Returns the widest part, as statistics are taken of it."""
    parts = [part for part, _ in joined.parts]
    builds: list[Builder] = []
    with undone_on_error(builds):
        for before, after in zip((joined.node, *joined.links), (*joined.links, None), strict=True):
            builds.append(Builder(graph, after or joined.stats[0], like=before))
            if before is joined.node:
                parts = [_as_in(builds[-1], part, before) for part in parts]
            if after is not None:
                parts = [_linked(builds[-1], joined, after, part, i) for i, part in enumerate(parts)]
        made = []
        for stats in joined.stats:
            builds.append(Builder(graph, stats, like=stats))
            made.append(_statistics(builds[-1], joined, stats, parts))
    for stats, result in zip(joined.stats, made, strict=True):
        want_gradients_as(stats, result)
        stats.replace_all_uses_with(result)
        graph.erase_node(stats)
    _erase(graph, joined)
    return parts[joined.widest]


def _as_in(build: Builder, part: Node, whole: Node) -> Node:
    """A part in the dtype that the whole has."""
    dtype = example_of(whole).dtype
    return part if example_of(part).dtype == dtype else build("to", part, dtype)


def _linked(build: Builder, joined: Joined, link: Node, part: Node, index: int) -> Node:
    """What a link makes of a part, which is not changed in place for it."""
    source = _source_of_link(link)
    target, args, kwargs = _functional(link), link.args, link.kwargs
    if is_sized_view(link):
        sizes = with_width(tuple(args[1:]), joined.classes, joined.parts[index][1])
        target = "reshape" if target == "view" else target
        return build(target, part, *sizes, **kwargs)
    operands = {a: part if a is source else _cut(build, joined, a, index) for a in link.all_input_nodes}
    args, kwargs = map_arg((args, kwargs), operands.__getitem__)
    return _as_in(build, build(target, *args, **kwargs), link)


def _functional(link: Node) -> Any:
    """The function that an edit is of, any other node's own."""
    if not any(written_by(link)):
        return link.target
    if isinstance(link.target, str):
        return link.target.rstrip("_")
    return getattr(operator, link.target.__name__.removeprefix("i"))


def _cut(build: Builder, joined: Joined, operand: Node, index: int) -> Node:
    """What stands beside the logits, for the columns of a part."""
    example = tensor_of(operand)
    if example is None or not example.dim() or not equal(example.shape[-1], joined.classes):
        return operand
    return build("narrow", operand, -1, joined.start(index), joined.parts[index][1])


def _statistics(build: Builder, joined: Joined, stats: Node, parts: list[Node]) -> Node:
    """The rows of the whole, of those of its parts."""
    labels, weights = _labels_and_weights(stats)
    wanted = _rows(stats)
    rows, sizes = wanted.closed(), [size for _, size in joined.parts]
    law = rows.law()
    made = []
    for i, part in enumerate(parts):
        own_labels = [_counted_from(build, y, joined.start(i)) for y in labels]
        own_weights = [_cut(build, joined, q, i) for q in weights]
        site = stats.kwargs["site"] if i == joined.widest else ops.NO_SITE
        made.append(build(ops.ROW_STATS, part, own_labels, own_weights, rows.encode(), site=site))

    held = [build("detach", packed) for packed in made]

    def combine(*blocks: Tensor) -> Tensor:
        owned = [own_rows(block, law, joined.start(i % len(sizes))) for i, block in enumerate(blocks)]
        carrying, constant = owned[: len(sizes)], owned[len(sizes) :]
        counts = torch.cat([blocks[0].new_full((1, 1), size) for size in sizes])
        packed = combined(law, torch.stack(carrying), counts, held=torch.stack(constant))
        return chosen(packed, rows, wanted)

    return build.traced(combine, [*made, *held])


def _counted_from(build: Builder, y: Node, start: int) -> Node:
    # A byte would come round to another column.
    return build(torch.sub, build("long", y), start) if start else y


def _erase(graph: Graph, joined: Joined) -> None:
    """Erase the concatenation. Who asked for the shape of its rows asks a part."""
    part, _ = joined.parts[0]
    for node in reversed([joined.node, *joined.links]):
        for user in list(node.users):
            user.replace_input_with(node, part)
        graph.erase_node(node)
