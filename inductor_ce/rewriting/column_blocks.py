"""Losses whose classes come in blocks, statistics carried from one to the next: as losses of all columns.

What was carried is replaced by the logsumexp of all columns, and by one pick in them; masks, means and all
else are left to the recogniser. Blocks that are products of parts of one weight are one product then, and a
head as any other; the user's products go, as nobody reads them any more. Few blocks of other kinds are
concatenated, and `joined_columns` takes them apart again. More than these are left as they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from ..algebra.blocks import Lse, Pick, Span, Sum, Total
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import constant, example_of, same_count, same_shape, shape_of, tensor_of
from ..graph.timeline import Timeline, written_by
from ..reading.block_reader import Blocks, Use
from ..reading.blocks import may_have_blocks, read_blocks
from .joined_columns import MAX_PARTS
from .one_product import NotOne, OneProduct


@dataclass(frozen=True)
class _Group:
    """Blocks, in the order in which they are made, and all uses of what is made of them."""

    blocks: tuple[Node, ...]
    uses: tuple[Use, ...]

    @property
    def sizes(self) -> list[int]:
        return [constant(shape_of(block)[-1]) or 0 for block in self.blocks]


def join_blocks(graph: Graph, min_vocab: int) -> None:
    """Make statistics that are carried from block to block those of all columns, where that is understood."""
    if not may_have_blocks(graph):
        return
    timeline = Timeline(graph)
    found = read_blocks(timeline)
    for group in _groups(timeline, found):
        if sum(group.sizes) >= min_vocab and _is_understood(timeline, group):
            _join(graph, timeline, found, group)


def _groups(timeline: Timeline, found: Blocks) -> Iterator[_Group]:
    """Blocks that anything brings together."""
    together: dict[Node, set[Node]] = {}
    for blocks in [*found.steps.values(), *(use.blocks for use in found.uses)]:
        joined = {*blocks}.union(*(together[block] for block in blocks if block in together))
        if any(together.get(block) is not joined for block in blocks):
            together |= dict.fromkeys(joined, joined)
    for joined in {id(each): each for each in together.values()}.values():
        if len(joined) > 1:
            ordered = sorted(joined, key=timeline.position.__getitem__)
            uses = [use for use in found.uses if use.blocks & joined]
            yield _Group(tuple(ordered), tuple(uses))


def _is_understood(timeline: Timeline, group: _Group) -> bool:
    """Whether all that anybody reads are whole normalisers, one at least, and picks in all blocks."""
    rows = shape_of(group.blocks[0])[:-1]
    if any(not same_shape(shape_of(block)[:-1], rows) for block in group.blocks):
        return False
    if len({example_of(block).dtype for block in group.blocks}) > 1:
        return False
    if not all(use.row is not None and _is_whole(timeline, group, use, use.row) for use in group.uses):
        return False
    return any(isinstance(name, Lse) for use in group.uses if use.row for name in use.row.names)


def _is_whole(timeline: Timeline, group: _Group, use: Use, row: Sum) -> bool:
    """Whether what is read is of all blocks alike, and may be made where it is read."""
    totals = {name.block: times for name, times in row.terms if isinstance(name, Total)}
    if totals and (totals.keys() != {*group.blocks} or len({*totals.values()}) > 1):
        return False
    others = [name for name in row.names if not isinstance(name, Total)]
    if any(name.blocks != {*group.blocks} for name in others):
        return False
    position = timeline.position[use.user]
    for pick in others:
        if isinstance(pick, Pick) and (
            _label(group, pick) is None or not timeline.unchanged(pick.y, pick.y, position)
        ):
            return False
    rows = shape_of(group.blocks[0])[:-1]
    return any(same_shape(shape_of(use.source), sizes) for sizes in (rows, (*rows, 1)))


def _label(group: _Group, pick: Pick) -> tuple[int, Span] | None:
    """(what labels are more than columns of all, the labels that have one), if each block takes its own.

    A label that is no column may have the first, or the last, where it was clamped.
    """
    pieces = {piece.block: piece for piece in pick.pieces}
    if len(pieces) != len(pick.pieces) or not same_count(shape_of(pick.y), shape_of(group.blocks[0])[:-1]):
        return None
    ordered = [pieces[block] for block in group.blocks]
    starts = list(itertools.accumulate(group.sizes, initial=0))
    offset = ordered[0].start
    if any(piece.start - start != offset for piece, start in zip(ordered, starts, strict=False)):
        return None
    if any(a.span.end != b.span.first for a, b in itertools.pairwise(ordered)):
        return None
    for piece in ordered:
        low = piece is ordered[0] and piece.bounds.first == offset
        high = piece is ordered[-1] and piece.bounds.end == offset + starts[-1]
        clamped = Span(-math.inf if low else piece.bounds.first, math.inf if high else piece.bounds.end)
        if not piece.span.within(clamped):
            return None
    return offset, Span(ordered[0].span.first, ordered[-1].span.end)


# Rewriting


def _join(graph: Graph, timeline: Timeline, found: Blocks, group: _Group) -> None:
    place = timeline.position[group.blocks[-1]] + 1
    while timeline.nodes[place].op == "placeholder":
        place += 1
    if not all(timeline.unchanged(block, block) for block in group.blocks):
        return
    normaliser = next(use for use in group.uses if use.row and any(isinstance(n, Lse) for n in use.row.names))
    builds = [Builder(graph, timeline.nodes[place], like=_like(normaliser))]
    with undone_on_error(builds):
        made = _made(graph, timeline, place, group, builds)
    if made is None:
        for build in reversed(builds):
            build.undo()
        return
    for use, result in zip(group.uses, made, strict=True):
        use.user.replace_input_with(use.source, result)
    _erase(graph, found, group)


def _made(
    graph: Graph, timeline: Timeline, place: int, group: _Group, builds: list[Builder]
) -> list[Node] | None:
    """What each use reads instead, with a gradient where it had one."""
    columns = _columns(builds[0], timeline, place, group)
    if columns is None:
        return None
    builds[0].tell_gradients(timeline.grad_mode(place) is True)
    made = []
    for use in group.uses:
        builds.append(Builder(graph, use.user, like=_like(use)))
        made.append(_result(builds[-1], group, columns, use))
        on = timeline.grad_mode(use.user) is True
        builds[-1].tell_gradients(on)
        wanted = on and example_of(use.source).requires_grad
        if example_of(made[-1]).requires_grad != wanted:
            return None
    return made


def _like(use: Use) -> Node:
    """Whose line is told: that of the loss, and not that of the last block."""
    return use.source if tensor_of(use.user) is None else use.user


def _columns(build: Builder, timeline: Timeline, place: int, group: _Group) -> Node | None:
    """All columns: of one product, or of few blocks beside each other."""
    try:
        return OneProduct(build, timeline, place)(group.blocks, len(shape_of(group.blocks[0])) - 1)
    except NotOne:
        build.undo()
    return build(torch.cat, list(group.blocks), -1) if len(group.blocks) <= MAX_PARTS else None


def _result(build: Builder, group: _Group, columns: Node, use: Use) -> Node:
    assert use.row is not None
    result: Node | None = None
    dtype = example_of(use.source).dtype
    wide = columns if example_of(columns).dtype == dtype else build("to", columns, dtype)
    terms = {Total if isinstance(name, Total) else name: times for name, times in use.row.terms}
    for name, times in terms.items():
        node = _statistic(build, group, wide, name)
        node = node if times == 1 else build(torch.mul, node, times)
        result = node if result is None else build(torch.add, result, node)
    assert result is not None
    if use.row.number:
        result = build(torch.add, result, use.row.number)
    result = result if example_of(result).dtype == dtype else build("to", result, dtype)
    kept = len(shape_of(use.source)) == len(shape_of(columns))
    return build("unsqueeze", result, -1) if kept else result


def _statistic(build: Builder, group: _Group, columns: Node, name: Any) -> Node:
    if name is Total:
        return build(torch.sum, columns, -1)
    if isinstance(name, Lse):
        return build(torch.logsumexp, columns, -1)
    return _picked(build, group, columns, name)


def _picked(build: Builder, group: _Group, columns: Node, pick: Pick) -> Node:
    label = _label(group, pick)
    assert label is not None
    offset, span = label
    rows = shape_of(columns)[:-1]
    y = pick.y if same_shape(shape_of(pick.y), rows) else build("reshape", pick.y, rows)
    column = build("sub", y, offset) if offset else y
    column = build("clamp", build("long", column), 0, sum(group.sizes) - 1)
    picked = build("squeeze", build("gather", columns, -1, build("unsqueeze", column, -1)), -1)
    sides = [build(how, y, int(n)) for how, n in (("ge", span.first), ("lt", span.end)) if math.isfinite(n)]
    if not sides:
        return picked
    inside = sides[0] if len(sides) == 1 else build(torch.logical_and, *sides)
    return build(torch.where, inside, picked, pick.otherwise)


def _erase(graph: Graph, found: Blocks, group: _Group) -> None:
    """Erase the steps of the group, and tensors of one number that nobody asks for any more."""
    for node in reversed(list(graph.nodes)):
        of = found.steps.get(node)
        if of is not None and not node.users and (of & {*group.blocks} or not (of or any(written_by(node)))):
            graph.erase_node(node)
