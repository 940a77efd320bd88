"""Losses of parts of one linear layer's rows: one operator for all of them.

    row_stats(z[0], [y_0]), row_stats(z[1], [y_1]), ...   =   s[:, 0], s[:, 1], ...
        for s = row_stats(z, [cat([y_0, y_1, ...])])

Where a loss is written sequence by sequence, position by position or half by half, each has logits of its
own. One operator that reads them all leaves the linear layer that makes them a head, in pieces.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from .. import ops
from ..common.compat.graphs import unset_fake_temporarily
from ..common.findings import name_of
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import Size, constant, example_of, same_count, shape_of, tensor_of
from ..graph.timeline import Timeline, written_by
from ..reading import spellings
from .arrange import ANY_LABEL, PADS_ROWS, elementwise_source, size_of
from .find_recipe import is_sized_view, with_width
from .linear_layers import plain_layer
from .rewrite import erase_with_sources

_VIEWS = {"getitem", "select", "narrow", "unsqueeze", "squeeze", "contiguous", "flatten"}
_SEVERAL = {"unbind", "chunk", "split", "tensor_split"}
_MOST_STEPS = 16
_LEAST_SHARE = 2  # all rows are computed: no fewer than one of so many is to be wanted

_AS_MANY = 1009, 1013  # rows, for which a symbolic size is taken in turn
_MOST_BESIDE = 1 << 12  # rows of the other dimensions, which are numbered as often

Cut = tuple[tuple[int, int], ...]  # how many rows are cut off before and behind, along each dimension


class Part(NamedTuple):
    """Statistics of some rows of a linear layer.

    Attributes:
        stats: the `row_stats`.
        layer: the linear layer, [..., V].
        lead: the sizes of the dimensions that its rows have where the first are cut off; one at most is
            symbolic.
        links: what is done to each logit between the layer and the statistics, first to last.
        views: what else there is between the two.
        cut: which rows it does not have.
        labels: of these.
        has_all: whether the statistics are of all rows, of which nobody reads others.
    """

    stats: Node
    layer: Node
    lead: tuple[Size, ...]
    links: tuple[Node, ...]
    views: tuple[Node, ...]
    cut: Cut
    labels: tuple[Node, ...]
    has_all: bool

    @property
    def known(self) -> list[int | None]:
        """`lead`, but None for a symbolic size."""
        return [constant(size) for size in self.lead]

    @property
    def sizes(self) -> list[int]:
        """Those of its own rows, but -1 for a symbolic one."""
        pairs = zip(self.known, self.cut, strict=True)
        return [-1 if size is None else size - before - behind for size, (before, behind) in pairs]


class _NotHere(Exception):
    """A node cannot be made where it is needed."""


def join_rows(graph: Graph) -> dict[int, int]:
    """Let one operator read the parts of each linear layer's rows. Returns which sites became which."""
    timeline = Timeline(graph)
    groups: dict[Hashable, list[Part]] = {}
    for stats in graph.find_nodes(op="call_function", target=ops.ROW_STATS):
        part = _part(stats)
        if part is not None:
            groups.setdefault(_kind(timeline, part), []).append(part)
    became: dict[int, int] = {}
    for parts in groups.values():
        along = _along(parts)
        if along is not None and _may_move(timeline, parts):
            became |= _join(graph, timeline, parts, along)
            timeline = Timeline(graph)  # labels may be made of what was joined
    return became


# Which rows


def _part(stats: Node) -> Part | None:
    """None where the statistics are of no part that is known, or have weights for each row."""
    z, labels, weights, _ = stats.args
    if any(len(shape_of(weight)) > 1 for weight in weights):  # type: ignore[union-attr, arg-type]
        return None
    path: list[Node] = []
    node: Any = z
    while isinstance(node, Node) and plain_layer(node) is None and len(path) < _MOST_STEPS:
        path.insert(0, node)
        node = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None
    if not isinstance(node, Node):
        return None
    links = [each for each in path if elementwise_source(each) is not None]
    others = [each for each in path if each not in links]
    whole = [node, *itertools.takewhile(lambda each: each in links or is_sized_view(each), path)]
    *lead, classes = shape_of(whole[-1])
    v = constant(classes)
    if v is None or any(constant(shape_of(each)[-1]) != v for each in whole):
        return None
    with unset_fake_temporarily():
        cut = _cut([each for each in others if each not in whole], lead, v)
    if cut is None:
        return None
    left = [size - before - behind for size, (before, behind) in zip(lead, cut, strict=True)]
    if not same_count(left, shape_of(z)[:-1]):  # type: ignore[arg-type]
        return None
    rows = tuple(lead), tuple(links), tuple(others), cut
    part = Part(stats, node, *rows, tuple(labels), has_all=False)  # type: ignore[arg-type]
    return _without_padding(part) or part


def _cut(views: list[Node], lead: list[Size], classes: int) -> Cut | None:
    """How many of the rows [*lead] views of them cut off, if what is left are ranges in their order.

    The views are made of the numbers of the rows, of a symbolic size for two numbers of them: that no
    other is cut otherwise is seen of how many are left.
    """
    known = [constant(size) for size in lead]
    if None not in known:
        return _cut_of(views, known, classes)  # type: ignore[arg-type]
    if known.count(None) > 1 or math.prod(size for size in known if size is not None) > _MOST_BESIDE:
        return None
    several = ([many if size is None else size for size in known] for many in _AS_MANY)
    found = {_cut_of(views, sizes, classes) for sizes in several}
    return found.pop() if len(found) == 1 else None


def _cut_of(views: list[Node], lead: list[int], classes: int) -> Cut | None:
    """The same of known sizes."""
    rows = torch.arange(math.prod(lead)).view(lead)
    numbers: Any = rows.unsqueeze(-1)
    for view in views:
        numbers = _viewed(view, numbers, classes)
    if not isinstance(numbers, Tensor) or not numbers.numel():
        return None
    firsts, lasts = (torch.unravel_index(end, lead) for end in (numbers.min(), numbers.max()))
    inside = rows[tuple(slice(int(a), int(b) + 1) for a, b in zip(firsts, lasts, strict=True))]
    if not torch.equal(inside.flatten(), numbers.flatten()):
        return None
    return tuple((int(a), size - 1 - int(b)) for a, b, size in zip(firsts, lasts, lead, strict=True))


def _viewed(view: Node, numbers: Any, classes: int) -> Any:
    """A view of the numbers of rows, which stand for all classes of them; None where it is no such view."""
    name, args = name_of(view), view.args[1:]
    if numbers is None or view.args[:1] != tuple(view.all_input_nodes):
        return None
    if isinstance(numbers, (list, tuple)):
        return numbers[args[0]] if name == "getitem" and isinstance(args[0], int) else None
    if (name not in _VIEWS | _SEVERAL and not is_sized_view(view)) or not _keeps_classes(view, classes):
        return None
    if args and is_sized_view(view) and name != "flatten":
        args = with_width(args, classes, 1)
    call = getattr(torch.Tensor, view.target) if isinstance(view.target, str) else view.target
    made = call(numbers, *args, **view.kwargs)
    example = tensor_of(view)
    if example is None:
        return made if name in _SEVERAL else None
    sizes = [constant(size) for size in example.shape[:-1]]
    alike = len(sizes) == made.dim() - 1 and made.shape[-1] == 1
    return made if alike and all(a in (None, b) for a, b in zip(sizes, made.shape, strict=False)) else None


def _keeps_classes(view: Node, classes: int) -> bool:
    """Whether all that a view gives has as many classes, which no number of a row tells."""
    examples = view.meta.get("example_value")
    each = examples if isinstance(examples, (list, tuple)) else [examples]
    return all(isinstance(e, Tensor) and e.dim() > 0 and constant(e.shape[-1]) == classes for e in each)


def _without_padding(part: Part) -> Part | None:
    """A part of all rows as one of those whose labels are not filled up; None where they are not alike."""
    padded = [_padding(label) for label in part.labels]
    if not padded or None in padded or any(map(any, part.cut)):
        return None
    shapes = {tuple(map(constant, shape_of(pad))) for pad in padded}  # type: ignore[arg-type]
    (cut, *others), (lead, *_) = {*map(_filled, padded)}, map(shape_of, padded)  # type: ignore[arg-type]
    known, *differing = shapes
    if cut is None or others or differing or known.count(None) > 1 or not same_count(lead, part.lead):
        return None
    labels = tuple(pad.args[0] for pad in padded if pad is not None)
    return part._replace(cut=cut, lead=lead, labels=labels, has_all=True)  # type: ignore[arg-type]


def _padding(label: Node) -> Node | None:
    """What filled labels of one a row up where rows had been cut off."""
    while not label.meta.get(PADS_ROWS):
        if name_of(label) not in ("reshape", "long") or not isinstance(label.args[0], Node):
            return None
        label = label.args[0]
    return label if isinstance(label.args[0], Node) and not label.args[0].meta.get(PADS_ROWS) else None


def _filled(pad: Node) -> Cut | None:
    """How much was filled up, before and behind."""
    if not isinstance(pad.args[1], (list, tuple)):
        return None
    amounts = [*pad.args[1], *[0] * (2 * len(shape_of(pad)) - len(pad.args[1]))]
    if any(not isinstance(number, int) for number in amounts):
        return None
    return tuple(zip(reversed(amounts[::2]), reversed(amounts[1::2]), strict=True))


# Which parts are joined


def _kind(timeline: Timeline, part: Part) -> Hashable:
    """What parts that are joined have in common."""
    _, _, weights, which = part.stats.args
    behind = tuple(tuple(_behind(label, part)) for label in part.labels)
    mode, example = timeline.grad_mode(part.stats), example_of(part.stats)
    links = tuple((link.target, *_beside(link)) for link in part.links)
    lead, learns = tuple(part.known), example.requires_grad
    return part.layer, lead, which, tuple(weights), behind, links, mode, learns  # type: ignore[arg-type]


def _beside(link: Node) -> tuple[Hashable, ...]:
    """What a link is given beside the logits."""
    (source,) = link.all_input_nodes
    given = [*enumerate(link.args), *sorted(link.kwargs.items())]
    return tuple((place, "logits" if each is source else repr(each)) for place, each in given)


def _along(parts: list[Part]) -> int | None:
    """The dimension along which two or more parts stand one behind another; None where they do not."""
    known = parts[0].known
    rows = sum(math.prod(size for size in part.sizes if size >= 0) for part in parts)
    if len(parts) < 2 or rows * _LEAST_SHARE < math.prod(size for size in known if size is not None):
        return None
    for dim, size in enumerate(known):
        ranges = sorted(part.cut[dim] for part in parts)
        if size is not None and all(size - a[1] <= b[0] for a, b in itertools.pairwise(ranges)):
            return dim
    return None


def _may_move(timeline: Timeline, parts: list[Part]) -> bool:
    """Whether all that is read is the same for all parts, wherever it is read."""
    layer, places = parts[0].layer, [timeline.position[part.stats] for part in parts]
    first = min(places)
    if not timeline.unchanged(layer, layer, max(places)):
        return False
    for part, at in zip(parts, places, strict=True):
        modes = {timeline.grad_mode(each) for each in (*part.links, part.stats)}
        given = [*part.labels, *part.stats.args[2]]  # type: ignore[misc]
        as_made = all(timeline.unchanged(link, link, at) for link in part.links)
        as_read = all(timeline.unchanged(each, max(first, timeline.position[each]), at) for each in given)
        seen = {timeline.grad_mode(each) for each in part.views}
        if not as_made or not as_read or len(modes) > 1 or not seen <= modes | {True}:
            return False
        if not timeline.same_autocast(layer, at):
            return False
    return True


# Joined


def _join(graph: Graph, timeline: Timeline, parts: list[Part], along: int) -> dict[int, int]:
    """Which sites became which; none where the labels are not known where the first statistics are made."""
    first = min((part.stats for part in parts), key=timeline.position.__getitem__)
    build = Builder(graph, first, like=first)
    parts = sorted(parts, key=lambda part: part.cut[along])
    try:
        with undone_on_error([build]):
            joined = _joined(build, timeline, first, parts, along)
            own = [joined if part.has_all else _rows_of(build, joined, part) for part in parts]
    except _NotHere:
        return {}
    build.tell_gradients(timeline.grad_mode(first) is True)
    for part, rows in zip(parts, own, strict=True):
        part.stats.replace_all_uses_with(rows)
    sites = {part.stats.kwargs["site"]: first.kwargs["site"] for part in parts}
    for part in parts:
        sources = part.stats.all_input_nodes
        graph.erase_node(part.stats)
        erase_with_sources(sources)
    return sites  # type: ignore[return-value]


def _joined(build: Builder, timeline: Timeline, first: Node, parts: list[Part], along: int) -> Node:
    """The statistics of all rows of the layer. The parts are in their order along a dimension."""
    part, (_, _, weights, which) = parts[0], first.args
    flat = part.layer
    if len(shape_of(flat)) != 2:
        flat = build("reshape", flat, -1, shape_of(flat)[-1])
    for link in part.links:
        flat = build.again(link, flat)
    labels = [_label(build, timeline, first, parts, along, k) for k in range(len(part.labels))]
    given = [_made_at(build, timeline, first, weight) for weight in weights]  # type: ignore[union-attr, arg-type]
    return build(ops.ROW_STATS, flat, labels, given, which, **first.kwargs)


def _label(build: Builder, timeline: Timeline, first: Node, parts: list[Part], along: int, k: int) -> Node:
    """The labels [N], or [N, K], of all rows; any in rows of no part."""
    rank, size, pieces = len(parts[0].lead), parts[0].known[along], []
    assert size is not None, "parts stand one behind another along a known size"
    for i, (part, following) in enumerate(itertools.zip_longest(parts, parts[1:])):
        label = _made_at(build, timeline, first, part.labels[k])
        if example_of(label).dtype != torch.int64:
            label = build("long", label)
        label = build("reshape", label, [*part.sizes, *_behind(label, part)])
        before, behind = part.cut[along]
        until_next = behind if following is None else behind + following.cut[along][0] - size
        pads = [*part.cut]
        pads[along] = (0 if i else before, until_next)
        amounts = [0, 0] * (len(shape_of(label)) - rank)
        amounts += [amount for pair in reversed(pads) for amount in pair]
        pieces.append(build(F.pad, label, amounts, value=ANY_LABEL) if any(amounts) else label)
    whole = build(torch.cat, pieces, along)
    return build("reshape", whole, [-1, *shape_of(whole)[rank:]]) if rank > 1 else whole


def _behind(label: Node, part: Part) -> list[Any]:
    """The number of labels of a row, where these are several."""
    return [] if part.has_all else list(shape_of(label)[1:])


def _made_at(build: Builder, timeline: Timeline, place: Node, node: Node) -> Node:
    """A node, or the same made again before a place.

    Raises:
        _NotHere: it reads otherwise there.
    """
    here, at = timeline.position[place], timeline.position[node]
    if at < here:
        if timeline.unchanged(node, node, here):
            return node
        raise _NotHere
    if node.target == "size" and len(node.args) == 2:
        return size_of(build, *node.args)  # type: ignore[arg-type, return-value]
    repeatable = spellings.is_repeatable(node) or PADS_ROWS in node.meta
    may = repeatable and not any(written_by(node)) and timeline.calm_since(at) <= here
    if not may or not all(timeline.unchanged(source, here, at) for source in node.all_input_nodes):
        raise _NotHere
    return build.again(node, {s: _made_at(build, timeline, place, s) for s in node.all_input_nodes})


def _rows_of(build: Builder, joined: Node, part: Part) -> Node:
    """The statistics [K, n] of a part, of those of all rows [K, N]."""
    ranges = (slice(None), *itertools.starmap(_range, zip(part.known, part.cut, strict=True)))
    if len(part.lead) == 1:
        return build(operator.getitem, joined, ranges)
    lead = [-1 if size is None else size for size in part.known]
    own = build(operator.getitem, build("reshape", joined, [shape_of(joined)[0], *lead]), ranges)
    return build("reshape", own, [shape_of(own)[0], -1])


def _range(size: int | None, cut: tuple[int, int]) -> slice:
    """What is left of a dimension, which has so many rows."""
    before, behind = cut
    return slice(before, -behind or None) if size is None else slice(before, size - behind)
