"""Losses that ranks make together by their own collectives: one all-gather of statistics in their place.

The collectives stand in the graph, or in autograd.Functions. Such a function may sum over ranks and hand its
gradient through; or it is the whole loss. Then its backward says which gradient is meant, whatever that is:
a sum of the probabilities, of ones at labels and of a constant, each times a number of the row.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import sympy
from torch.fx import Graph, Node

from .. import algebra, ops
from ..algebra import Vocab, parts
from ..algebra.notation import render
from ..common.compat.distributed import ALL_GATHER, ALL_REDUCE, WAIT, calls, calls_in
from ..common.findings import Miss, Site, make_miss, name_of, user_line
from ..common.strategies import MATERIALISE
from ..graph.builder import Builder, undone_on_error
from ..graph.functions import Body, function_bodies, inner, joined
from ..graph.shapes import bytes_of, number_of, requires_grad, shape_of, tensor_of
from ..graph.timeline import Timeline, written_by
from ..reading import spellings
from ..reading.part_values import NotRead, Parts, Summed
from ..reading.parts import read_parts
from ..reading.steps import View
from ..reading.views import viewed
from .part_rows import PartRows


def rewrite_by_hand(graph: Graph, numbers: Iterator[int]) -> list[Site | Miss]:
    """Rewrite every such loss that is understood. What is not stays as it is, and is told."""
    bodies = list(function_bodies(graph))
    if not any(map(_has_collective, [graph, *(body.forward for body in bodies)])):
        return []
    told: list[Site | Miss | None] = []
    for body in bodies:
        if _sum_of(body) is None and _has_collective(body.forward):
            told.append(_rewrite_function(graph, body, numbers))
    timeline = Timeline(graph)
    sums = {body.call: summed for body in function_bodies(graph) if (summed := _sum_of(body)) is not None}
    for base, first in _bases(timeline).items():
        found = read_parts(timeline, base, sums, since=_edited(timeline, base, first))
        told.append(None if found is None else _rewrite_uses(graph, timeline, found, numbers))
    return [each for each in told if each is not None]


def _miss(why: NotRead) -> Miss:
    return make_miss(why.node, why.refusal.reason, why.refusal.sentence(why.node))


def _has_collective(graph: Graph) -> bool:
    return bool(calls_in(graph, ALL_REDUCE) or calls_in(graph, ALL_GATHER))


def _sum_of(body: Body) -> Summed | None:
    """What a function sums over the ranks of a group, where it hands the gradient through."""
    inputs, steps, returned = inner(body.forward)
    gradients, backward, passed = inner(body.backward)
    outputs = returned[0] if isinstance(returned, tuple) and len(returned) == 2 else None
    pairs = zip(inputs, body.inputs, strict=False)
    given = [(own, outer) for own, outer in pairs if tensor_of(outer) is not None]
    numbers = [outer for outer in body.inputs if tensor_of(outer) is None]  # sizes, of dynamic shapes
    if len(inputs) != len(body.inputs) or len(given) != 1 or backward or not gradients:
        return None
    if not isinstance(outputs, tuple) or not isinstance(passed, tuple):
        return None
    if not all(isinstance(number, Node) for number in numbers):
        return None
    ((own, outer),) = given
    at = inputs.index(own)
    if passed[at : at + 1] != (gradients[0],) or any(passed[:at] + passed[at + 1 :]):
        return None
    found = _group_of_sum(own, steps, outputs)
    return None if found is None else Summed(outer, *found)


def _group_of_sum(source: Node, steps: list[Node], outputs: tuple[Any, ...]) -> tuple[Any, bool] | None:
    """(the group over which `steps` sum a tensor, or a copy of it, and nothing more; whether in its place)"""
    own, steps = source, list(steps)
    while steps and name_of(steps[0]) in ("clone", "contiguous") and steps[0].args == (own,):
        own = steps.pop(0)
    if len(steps) < 2 or not calls(steps[0], ALL_REDUCE) or not calls(steps[1], WAIT):
        return None
    reduced, whole, *ends = steps
    results, in_place = [whole], False
    if ends and (ends[0].target, ends[0].args) == ("copy_", (own, whole)):
        in_place = Timeline.storage(own) == Timeline.storage(source)
        results, ends = [own, *([source] if in_place else [])], ends[1:]
    if ends and ends[0].target == "view_as" and ends[0].args[0] in results:
        results = [ends.pop(0)]
    alike = len(outputs) == 1 and outputs[0] in results and reduced.args[:2] == (own, "sum")
    return (reduced.args[2], in_place) if alike and not ends else None


def _bases(timeline: Timeline) -> dict[Node, Node]:
    """The logits of whose rows somebody takes the maximum, or logsumexp, each with who does so first."""
    found: dict[Node, Node] = {}
    for node in timeline.nodes:
        spelled = spellings.read(node)
        if spelled is None or spelled[0].name not in ("amax", "max", "logsumexp"):
            continue
        base = spelled[1].get("input")
        while isinstance(base, Node) and (source := _same_logits(base)) is not None:
            base = source
        example = tensor_of(base)
        if example is None or example.dim() < 2 or not example.is_floating_point():
            continue
        if isinstance(base, Node):
            found.setdefault(base, node)
    return found


def _edited(timeline: Timeline, base: Node, first: Node) -> int:
    """Behind which node logits are as they are first read: the rank with padding may alone have filled it.

    What is written has no gradient of its own, or they are read from where they are made.
    """
    start, _ = timeline.window(base, timeline.position[first])
    own = timeline.position[base] + 1
    edits = [node for node in timeline.edits(base) if own <= timeline.position[node] < start]
    given = [n for node in edits for n in node.all_input_nodes if not timeline.shares_storage(n, base)]
    return own if any(map(requires_grad, given)) else start


def _same_logits(node: Node) -> Node | None:
    """What a node is a cast, a copy or a view of, with the classes where they were."""
    spelled = spellings.read(node)
    if spelled is not None and spelled[0].name == "detach":
        return spelled[1]["input"]
    source = viewed(node)
    alike = source is not None and shape_of(source)[-1:] == shape_of(node)[-1:]
    return source if alike and spelled is not None and spelled[0].view in (View.SAME, View.RESHAPE) else None


# In the graph itself


def _rewrite_uses(
    graph: Graph, timeline: Timeline, found: Parts, numbers: Iterator[int]
) -> Site | Miss | None:
    uses = found.whole
    if found.not_read is not None:
        return _miss(found.not_read)
    if not any(use.value.expr.has(algebra.LSE) for use in uses):  # type: ignore[union-attr]
        return None
    if any(_needs_more(use.value.expr) for use in uses) or _is_kept_as_edited(found):
        return None
    attached = {use.value.attached for use in uses} - {None}
    place = min(timeline.position[use.user] for use in uses)
    on = timeline.grad_mode(place) is True
    if len(attached) > 1 or (attached == {True} and not on):
        return None
    read = [*(node for node, _ in found.labels.values()), *found.masks.values(), *found.others.values()]
    since = {node: timeline.position[at] for node, at in found.labels.values()}
    for node in read:
        position = timeline.position[node]
        if position >= place or not timeline.unchanged(node, since.get(node, position + 1)):
            return None
    if not timeline.unchanged(found.logits, found.since):
        return None
    number = next(numbers)
    first = timeline.nodes[place]
    build = Builder(graph, first, like=uses[0].source)
    with undone_on_error([build]):
        logits = found.logits if attached == {True} else build("detach", found.logits)
        emitter = PartRows(build, found, logits, number, {})
        made = []
        for use in uses:
            emitter.build = later = Builder(graph, use.user, like=use.source)
            made.append((use, emitter.result(use.value.expr, use.source)))
            build.created += later.created
    for use, result in made:
        use.user.replace_input_with(use.source, result)
    _erase(graph, found.steps)
    return _site(found, [use.value.expr for use in uses], uses[0].source, number)


def _is_kept_as_edited(found: Parts) -> bool:
    """Whether what stays may read what steps that go have written in place."""
    return len(found.uses) > len(found.whole) and any(any(written_by(step)) for step in found.steps)


def _needs_more(expr: sympy.Expr) -> bool:
    """Whether a row expression has, of the columns of this rank alone, more than the sum of the logits."""
    return parts.is_here(expr.subs({parts.SUM_HERE: 0, parts.V_HERE: 1}))


def _erase(graph: Graph, steps: set[Node]) -> None:
    for node in reversed(list(graph.nodes)):
        if node in steps and not node.users:
            graph.erase_node(node)


# In a function with a backward of its own


def _rewrite_function(graph: Graph, body: Body, numbers: Iterator[int]) -> Site | Miss | None:
    both = joined(body)
    if both is None:
        return None
    nodes, timeline = both.nodes, Timeline(both.graph)
    inputs = dict(zip(inner(body.forward)[0], body.inputs, strict=True))
    given = {nodes[inner]: outer for inner, outer in inputs.items()}
    for base in _bases(timeline):
        if base not in given or base not in both.gradients:
            continue
        others = [outer for node, outer in given.items() if node is not base and requires_grad(outer)]
        found = read_parts(timeline, base, {}, [both.result, both.gradients[base]], own_backward=True)
        if found is not None and found.not_read is not None:
            return _miss(found.not_read)
        meant = None if found is None or found.whole or others else _meant(found, both.upstream)
        if found is not None and meant is not None:
            return _inline(graph, body, found, meant, nodes, given, numbers)
    return None


def _meant(found: Parts, upstream: Node) -> sympy.Expr | None:
    """What has the gradient that the backward computes."""
    loss, dz = found.asked
    g = next((symbol for symbol, node in found.others.items() if node is upstream), None)
    if loss is None or dz is None or g is None:
        return None
    if isinstance(loss.expr, Vocab) or not loss.expr.has(algebra.LSE):
        return None
    if not isinstance(dz.expr, Vocab) or loss.expr.has(g) or _needs_more(loss.expr):
        return None
    return parts.potential(dz.expr, g, found.picked, {*found.masks})


def _inline(
    graph: Graph,
    body: Body,
    found: Parts,
    meant: sympy.Expr,
    nodes: dict[Node, Node],
    given: dict[Node, Any],
    numbers: Iterator[int],
) -> Site | None:
    """The loss in place of the call, and in the graph what else the forward computes."""
    results = [n for n in body.call.users if n.target is operator.getitem and n.args[1] == 0]
    if len(results) != 1 or len(body.call.users) != 1:
        return None
    (result,) = results
    number = next(numbers)
    outer = dict(given)
    build = Builder(graph, body.call, like=result)
    with undone_on_error([build]):
        numbers_of_backward = [n for n in inner(body.backward)[1] if number_of(n) is not None]
        for step in [*inner(body.forward)[1], *numbers_of_backward]:
            own = nodes[step]
            if own not in found.steps and all(n in outer for n in own.all_input_nodes):
                with graph.inserting_before(body.call):
                    outer[own] = graph.node_copy(own, outer.__getitem__)
                build.created.append(outer[own])
        emitter = PartRows(build, found, outer[found.logits], number, outer)
        loss = found.asked[0]
        assert loss is not None
        made = emitter.result(loss.expr, result, meant)
    result.replace_all_uses_with(made)
    for node in (result, body.call, *body.call.args[:2]):
        if isinstance(node, Node) and not node.users:
            graph.erase_node(node)
    return _site(found, [loss.expr], made, number)


def _site(found: Parts, exprs: list[sympy.Expr], node: Node, number: int) -> Site:
    location, code = user_line(node)
    forms = [render(expr.subs({algebra.MAX_HELD: algebra.MAX, **found.numbers})) for expr in exprs]
    statistics = ["lse", *(f"pick({y})" for y in found.picked)]
    return Site(
        location,
        code,
        "; ".join(dict.fromkeys(forms)),
        tuple(statistics),
        ops.Rows.of(len(found.picked)).encode(),
        sharded=True,
        strategy=MATERIALISE,
        logits_bytes=bytes_of(found.logits),
        id=number,
    )
