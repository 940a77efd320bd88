"""Divergences between several sets of logits: what may be replaced, and by what.

The normalisers of each side are written as torch has them, a maximum and a sum of exponentials through which
no gradient flows, and are read with all other losses of the same logits in a second reading of the graph. So
one `row_stats` serves a cross entropy and a divergence. What is summed over all sides is one `divergence`.
"""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from .. import algebra, ops
from ..algebra import divergences, entries_text
from ..algebra.entries import Entries
from ..common.compat.graphs import is_dtensor
from ..common.failsafe import attempt
from ..common.findings import Reason, Refusal
from ..common.options import Options
from ..graph.builder import Builder
from ..graph.shapes import example_of, shape_of, tensor_of
from ..graph.timeline import Mode, Timeline
from ..graph.walk import reached
from ..ops.divergences import encode
from ..reading import spellings
from ..reading.context import kind_of
from ..reading.divergences import Between, Side, Term, is_loss_of_one, read_divergences
from ..reading.entries import LOSSES
from ..reading.losses import modernised
from ..reading.row_views import Index, Permute, Reshape, RowView
from ..reading.values import Logits, Reading, RowValue, row_expr
from .arrange import first_size, row_sizes, size_of
from .escapes import KEPT, escape, needed_nodes
from .kept import for_whom
from .legal import few_classes, refusal_of_edit, refusal_of_graph, refusal_of_logits
from .rewrite import erase_with_sources, want_gradients_as

LEFT = "a divergence is left as it was"

# In the meta of normalisers: the divergence that they are for, as text, once, and "" elsewhere.
FORM = "inductor_ce_divergence"

# Of a loss that is one of one side as well, as it is where the logits are DTensors.
CONSTANT = "targets constant"

OF_RANKS = Refusal(
    Reason.UNSUPPORTED_TENSOR, "It is a divergence between several sets of logits, which are DTensors."
)
ENTRIES_OF_RANKS = Refusal(
    Reason.UNSUPPORTED_TENSOR, "It sums what each entry makes by itself, of logits that are a DTensor."
)
NOT_WEIGHED = Refusal(
    Reason.MIXTURE,
    "It sums logarithms over the classes that are weighed by no probabilities, or one of a mixture of "
    "probabilities that is weighed by others than those that are in it.",
)
EDITED = Refusal(Reason.MUTATED, "Logits of a divergence are changed in place after they are read by it.")


def fuse_divergences(graph: Graph, reading: Reading, options: Options) -> bool:
    """Replace those that may be, and keep in the reading why others are left. Returns whether it did any."""
    found = list(read_divergences(reading))
    if not found:
        return False
    everywhere = refusal_of_graph(reading)
    refused = {f.node: _few(f, options) or everywhere or _refusal(reading, f) for f in found}
    allowed = [f for f in found if refused[f.node] is None]
    for each in _escaping(reading, allowed):
        allowed.remove(each)
    for each in found:
        refusal = None if each.is_of_one else refused[each.node]
        if refusal is not None and refusal.reason is Reason.SMALL_VOCAB:
            reading.miss(each.node, refusal)
        elif refusal is not None:
            reading.between |= dict.fromkeys(each.wide, (each.node, refusal))
    made: dict[Mode, Made] = defaultdict(dict)  # a side made under no_grad has no gradient
    modes = {f.node: reading.timeline.grad_mode(f.node) for f in allowed}
    now: dict[Node, Node] = {}
    done = [
        each
        for each in allowed
        if attempt(LEFT, _rewrite, graph, each, made[modes[each.node]], now)[1] is None
    ]
    for each in done:
        _erase(each)
    return bool(done)


# Which may be replaced


def _few(found: Between, options: Options) -> Refusal | None:
    z = found.sides[0].logits
    return few_classes(z.node, z.axis, options)


def _refusal(reading: Reading, found: Between) -> Refusal | None:
    logits = [side.logits for side in found.sides]
    if not found.terms:
        return NOT_WEIGHED
    if any(is_dtensor(tensor_of(z.node)) for z in logits):
        return ENTRIES_OF_RANKS if isinstance(found.terms[0].divergence, Entries) else OF_RANKS
    timeline = reading.timeline
    if any(timeline.version(z.node, len(timeline.nodes)) != z.version for z in logits):
        return EDITED
    refusals = (refusal_of_logits(z) or refusal_of_edit(reading, z) for z in logits)
    return next((refusal for refusal in refusals if refusal is not None), None)


def _escaping(reading: Reading, allowed: Iterable[Between]) -> list[Between]:
    """Those whose log-probabilities something else needs, by which they are in memory in any case."""
    found = list(allowed)
    escaping: list[Between] = []
    while True:
        ends = {each.node for each in found}
        inner = {node for each in found for node in each.wide} - ends
        made_of_them = set(reached(ends, lambda node: node.users))
        losses = _losses_beside(reading, found) - made_of_them - inner
        inner -= reading.looked_through
        reading.looked_through |= inner
        needed = needed_nodes(reading, ends | losses, losses)
        reading.looked_through -= inner
        place = reading.timeline.position.__getitem__
        stay = {each.node: sorted((each.wide - {each.node}) & needed, key=place) for each in found}
        facts = {each.node: _kept(reading, each, stay[each.node], needed) for each in found}
        more = [each for each in found if stay[each.node] and not facts[each.node]]
        if not more:
            for end, fact in facts.items():
                for node in (end, *stay[end]) if fact else ():
                    node.meta[KEPT] = fact
            return escaping
        for each in more:
            found.remove(each)
            if not each.is_of_one:
                refusal = escape(reading, stay[each.node], needed)
                reading.between |= dict.fromkeys(each.wide, (each.node, refusal))
        escaping += more


def _kept(reading: Reading, found: Between, wide: list[Node], needed: set[Node]) -> str:
    """For whom log-probabilities `wide` are kept, "" where there is no backward that would be spared.

    What is brought along and made of them, as their own maximum or sum, would not be the same to the bit.
    """
    is_wanted = any(term.divergence.wanted for term in found.terms)
    brought = reached((*found.tensors, *found.numbers, *found.constants), reading.timeline.sources)
    is_own = not set(wide).isdisjoint(brought)
    return for_whom(reading, found.node, wide, needed) if wide and is_wanted and not is_own else ""


def _losses_beside(reading: Reading, found: Iterable[Between]) -> set[Node]:
    """The losses of one tensor of logits, and what else is made of rows that have one: it is with them."""
    losses = {node for node in reading.values if is_loss_of_one(reading, node)}
    logits = {reading.on_logits(node).logits for node in losses}  # type: ignore[union-attr]
    logits |= {side.logits for each in found for side in each.sides}
    rows = [(n, v) for n, v in reading.values.items() if isinstance(v, RowValue) and v.logits in logits]
    return losses | {node for node, value in rows if not algebra.lacks_gradient(row_expr(value))}


# The rewrite


def _rewrite(graph: Graph, found: Between, made: Made, now: dict[Node, Node]) -> None:
    """Put a `divergence` in the place of a node, which is left without users, and tell `now` of it."""
    build = Builder(graph, found.node, like=found.node)
    known = dict(made)
    beside = found.tensors, found.numbers, found.constants
    tensors, numbers, constants = (tuple(now.get(node, node) for node in nodes) for nodes in beside)
    found = replace(found, tensors=tensors, numbers=numbers, constants=constants)
    try:
        result = _result(build, found, made)
    except Exception:
        build.undo()
        made.clear()
        made |= known
        raise
    want_gradients_as(found.node, result)
    found.node.replace_all_uses_with(result)
    now[found.node] = result


def _result(build: Builder, found: Between, made: Made) -> Node:
    args = spellings.arguments_of(found.end)
    sides = [_side(build, side, made) for side in found.sides]
    first = sides[min(found.terms[0].divergence.wanted, default=0)].d
    first.meta[FORM] = "; ".join(filter(None, [first.meta[FORM], _form(found)]))
    if KEPT in found.node.meta:
        first.meta[KEPT] = found.node.meta[KEPT]
    tensors = [_beside(build, found, tensor, first_size(build, sides[0].m)) for tensor in found.tensors]
    numbers = [_of_rows(build, found, number) for number in found.numbers]
    numbers += [_of_rows(build, found, build("detach", number)) for number in found.constants]
    parts = [_rows(build, found, term, sides, tensors, numbers) for term in found.terms]
    rows = functools.reduce(functools.partial(build, torch.add), parts)
    result = _reduced(build, found, rows, args)
    dtype = tensor_of(found.node).dtype  # type: ignore[union-attr]
    return result if tensor_of(result).dtype == dtype else build("to", result, dtype)  # type: ignore[union-attr]


def _rows(
    build: Builder,
    found: Between,
    term: Term,
    sides: list[Normalised],
    tensors: list[Node],
    numbers: list[Node],
) -> Node:
    """A number for each row, arranged as what is summed, with an axis of size 1 for the classes."""
    wanted = term.divergence.wanted
    zs = [side.z if u in wanted else side.held for u, side in enumerate(sides)]
    rows_of = [side.m for side in sides], [*(side.d for side in sides), *numbers]
    packed = build(ops.DIVERGENCE, [*zs, *tensors], *rows_of, encode(term.divergence))
    rows = build(torch.select, packed, 0, 0)
    if len(shape_of(found.summand)) != 2:
        rows = build("reshape", rows, row_sizes(build, found.summand, found.axis))
    rows = build("unsqueeze", rows, found.axis)
    for factor in term.factors:
        if factor.how == "mul":
            rows = build(torch.mul, rows, factor.node)
        elif factor.how == "div":
            rows = build(torch.div, rows, factor.node)
        else:
            pair = (0.0, rows) if factor.how == "where not" else (rows, 0.0)
            mask = build("unsqueeze", factor.node, -1) if factor.how == "chosen" else factor.node
            rows = build(torch.where, mask, *pair)
    return rows


def _beside(build: Builder, found: Between, tensor: Node, n: Any) -> Node:
    """What is brought along for each entry, row or class, as [N, V]; no copy where it is not of entries."""
    kind, axis = kind_of(tensor, found.summand, found.axis), found.axis
    rank, v = len(shape_of(found.summand)), size_of(build, found.summand, axis)
    node = build("detach", tensor)
    if kind == "columns":
        node = node if axis == rank - 1 else build(torch.movedim, node, axis, -1)
        return node if rank == 2 else build("reshape", node, [-1, v])
    if kind == "row":
        node = build("unsqueeze", _of_rows(build, found, node), -1)
    else:
        node = build("reshape", node, [1, -1])
    return build("expand", node, [n, v])


def _of_rows(build: Builder, found: Between, node: Node) -> Node:
    """What broadcasts over the classes, [N]."""
    rank, axis = len(shape_of(found.summand)), found.axis
    for _ in range(rank - len(shape_of(node))):
        node = build("unsqueeze", node, 0)
    node = build("squeeze", node, axis)
    return build("reshape", build("expand", node, row_sizes(build, found.summand, axis)), [-1])


class Normalised(NamedTuple):
    """The logits of a side [N, V], the same without gradient, and of each row its maximum m and d."""

    z: Node
    held: Node
    m: Node
    d: Node


Made = dict[tuple[Logits, tuple[RowView, ...]], Normalised]


def _side(build: Builder, side: Side, made: Made) -> Normalised:
    """The normalisers of a side, made once for all divergences."""
    key = side.logits, side.steps
    if key not in made:
        z = _flat(build, side)
        held = build("detach", z)
        dtype = ops.stats_dtype_of(tensor_of(z).dtype)  # type: ignore[union-attr]
        wide = held if tensor_of(z).dtype == dtype else build("to", held, dtype)  # type: ignore[union-attr]
        m = build(torch.amax, wide, -1)
        exp = build(torch.exp, build(torch.sub, wide, build("unsqueeze", m, -1)))
        d = build(torch.sum, exp, -1)
        m.meta[FORM] = d.meta[FORM] = ""
        made[key] = Normalised(z, held, m, d)
    return made[key]


def _flat(build: Builder, side: Side) -> Node:
    """The logits of a side as its rows are arranged, [N, V]."""
    z, axis = side.logits.node, side.logits.axis
    rank, v = len(shape_of(z)), shape_of(z)[axis]
    node = z if axis == rank - 1 else build(torch.movedim, z, axis, -1)
    for step in side.steps:
        if isinstance(step, Reshape):
            node = build("reshape", node, [*row_sizes(build, step.result, step.result_axis), v])
        elif isinstance(step, Permute):
            node = build("permute", node, [*step.order, len(step.order)])
        elif isinstance(step, Index):
            node = build("select", node, step.dim, step.at)
        else:
            cuts = zip(step.left, step.right, strict=True)
            node = _cut(build, node, tuple(slice(a or None, -b if b else None) for a, b in cuts))
    return node if len(shape_of(node)) == 2 else build("reshape", node, [-1, v])


def _cut(build: Builder, node: Node, index: tuple[slice, ...]) -> Node:
    """node[index], the user's own where there is one: so a layer's rows are cut once for all losses.

    One that is cut under no_grad has no gradient.
    """
    for user in node.users:
        same = user.target is operator.getitem and isinstance(user.args[1], tuple)
        same = same and _without_whole(user.args[1]) == _without_whole(index) and build.comes_after(user)
        if same and (not example_of(node).requires_grad or _is_recorded(user)):
            return user
    return build(operator.getitem, node, index)


def _is_recorded(node: Node) -> bool:
    """Whether gradients are on where a node stands."""
    return Timeline(node.graph).grad_mode(node) is True


def _without_whole(index: Any) -> tuple[Any, ...]:
    """An index without what takes all of the last dimensions."""
    parts = list(index)
    while parts and parts[-1] == slice(None):
        parts.pop()
    return tuple(parts)


def _reduced(build: Builder, found: Between, rows: Node, args: dict[str, Any]) -> Node:
    """As the user's own sum, mean or loss reduces what it sums."""
    how, is_loss = _how(found, args)
    given: tuple[Any, ...] = (args["dim"], bool(args.get("keepdim"))) if args.get("dim") is not None else ()
    given = () if is_loss else given
    chosen = [f for f in found.terms[0].factors if f.how == "chosen"]
    if how == "mean" and chosen:
        v = size_of(build, found.summand, -1)
        count = build(torch.mul, build(torch.sum, chosen[0].node), v)
        return build(torch.div, build(torch.sum, rows), count)
    if how == "mean":
        v = size_of(build, found.summand, found.axis)
        return build(torch.div, build(torch.mean, rows, *given), v)
    total = build(torch.sum, rows, *given)
    return build(torch.div, total, first_size(build, args["input"])) if how == "batchmean" else total


def _how(found: Between, args: dict[str, Any]) -> tuple[str, bool]:
    """(how it is reduced, whether by a loss)"""
    name = spellings.step_of(found.end).name  # type: ignore[union-attr]
    is_loss = name in ("kl_div", *LOSSES)
    return (modernised(args).get("reduction", "mean") if is_loss else name), is_loss


def _form(found: Between) -> str:
    """What is computed, as text."""
    args = spellings.arguments_of(found.end)
    how, is_loss = _how(found, args)
    if how == "sum" and not is_loss and args.get("dim") is not None:
        how = ""
    rendered = " + ".join(_rendered(term.divergence) for term in found.terms)
    rendered += f", {CONSTANT}" if found.is_of_one else ""
    return f"{how}({rendered})" if how else rendered


def _rendered(formula: divergences.Divergence | Entries) -> str:
    return entries_text.render(formula) if isinstance(formula, Entries) else divergences.render(formula)


def _erase(found: Between) -> None:
    """Erase what made a divergence and is not used any more, with the views of logits that it read."""
    there = set(found.node.graph.nodes)
    erase_with_sources(node for node in found.wide | {found.node} if node in there)
