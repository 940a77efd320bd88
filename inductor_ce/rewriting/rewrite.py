"""Rewrite: replace the nodes of a group by one `row_stats` and torch operations of size [N]."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from .. import algebra
from ..common.compat.graphs import is_plain_tensor
from ..common.findings import user_line
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import equal, example_of, same_shape, shape_of, tensor_of
from ..graph.timeline import Timeline, written_by
from ..ops.verified import ORIGINAL, TAPPED, VERIFIED, new_key
from ..reading import spellings
from ..reading.values import Afterwards, LossValue, Reading, Reduction
from .arrange import arranged, first_size
from .compared import reads_as_written
from .groups import Group
from .statistics import Statistics


def rewrite(graph: Graph, reading: Reading, group: Group, site: int, verify: bool = False) -> str:
    """Use statistics in place of the nodes of `group`, with the id of its site; returns the rows of them.

    With `verify` the nodes stay, to be compared with. On an exception the graph is as it was.
    """
    build = Builder(graph, reading.timeline.nodes[group.place], like=group.nodes[0])
    with undone_on_error([build]):
        key = new_key(user_line(group.nodes[0])[0]) if verify else None
        stats = Statistics(build, reading, group, site, key)
        results = [(node, _result(build, stats, reading, group, node)) for node in group.nodes]
    if key is not None:
        results = _beside_originals(graph, reading, group, stats, results, key)
    for node, result in results:
        # Nodes of other groups were given what may stand at their places.
        want_gradients_as(node, result)
        _replace(reading, group, node, result)
        reading.results[node] = result, group.place
    return stats.rows.encode()


def _replace(reading: Reading, group: Group, node: Node, result: Node) -> None:
    """Give a result to the user's nodes, but to those that need what the user's own node has, to the bit."""

    def takes(user: Node) -> bool:
        return user in reading.timeline.position and not reads_as_written(reading, user, node, group.logits)

    node.replace_all_uses_with(result, delete_user_cb=takes)


def want_gradients_as(node: Node, result: Node) -> None:
    """Let the example of a result require a gradient where that of the node in whose place it stands does.

    A region that is used more than once says by the examples of its outputs which of them have gradients.
    """
    example, wanted = tensor_of(result), tensor_of(node).requires_grad  # type: ignore[union-attr]
    assert example is not None
    if example.requires_grad != wanted:
        result.meta["example_value"] = example.detach().requires_grad_(wanted)


def beside_original(graph: Graph, node: Node, result: Node) -> None:
    """Let all who read a node be given a result, which is compared with it when the program runs."""
    build = Builder(graph, node.next, like=node)
    chosen = build(VERIFIED, result, node, new_key(user_line(node)[0]), 0)
    want_gradients_as(node, chosen)
    node.replace_all_uses_with(chosen, delete_user_cb=lambda user: user is not chosen)


def _beside_originals(
    graph: Graph,
    reading: Reading,
    group: Group,
    stats: Statistics,
    results: list[tuple[Node, Node]],
    key: str,
) -> list[tuple[Node, Node]]:
    """Each result with the node that it is to replace, one of which is used when the program runs."""
    timeline = reading.timeline
    chosen = []
    for index, (node, result) in enumerate(results):
        after = max(group.place, timeline.position[node] + 1)
        build = Builder(graph, timeline.nodes[after], like=node)
        chosen.append((node, build(VERIFIED, result, node, key, index)))
    if stats.is_tapped:
        logits = group.logits.node
        after = max(timeline.position[logits] + 1, _first_operation(timeline))
        build = Builder(graph, timeline.nodes[after], like=logits)
        original = build(TAPPED, logits, key, ORIGINAL)
        logits.replace_all_uses_with(original, delete_user_cb=timeline.position.__contains__)
    return chosen


def _first_operation(timeline: Timeline) -> int:
    return next(i for i, node in enumerate(timeline.nodes) if node.op != "placeholder")


# What Dynamo asks of tensors whose sizes depend on data.
SIZES = ("size", torch.ops.aten.sym_size.int)


def sweep(graph: Graph, reading: Reading) -> None:
    """Erase the steps of losses and chains that nobody uses any more; once, after all rewrites."""
    left = _erase_unused(graph, reading.timeline.nodes)
    if reading.added:
        for z, node in reading.added.items():
            are_tensors = all(tensor_of(each) is not None for each in (z, node))  # sizes are added too
            asks = all(user.target in SIZES for user in node.users)
            if z.users and asks and are_tensors and same_shape(shape_of(z), shape_of(node)):
                node.replace_all_uses_with(z)
        _erase_unused(graph, left)


def _erase_unused(graph: Graph, nodes: list[Node]) -> list[Node]:
    """Erase what nobody uses of some nodes. Returns the others."""
    left = []
    for node in reversed(nodes):
        if _is_unused(node):
            graph.erase_node(node)
        else:
            left.append(node)
    return left[::-1]


def erase_with_sources(nodes: Iterable[Node]) -> None:
    """Erase the steps that nobody uses, of some nodes of a graph and of what they are made of."""
    waiting, gone = [*nodes], set[Node]()
    while waiting:
        node = waiting.pop()
        if node not in gone and _is_unused(node):
            gone.add(node)
            waiting += node.all_input_nodes
            node.graph.erase_node(node)


def _is_unused(node: Node) -> bool:
    return not node.users and spellings.is_repeatable(node) and not any(written_by(node))


def _result(build: Builder, stats: Statistics, reading: Reading, group: Group, node: Node) -> Node:
    value: Any = reading.values[node]
    rows = [_rows(build, stats, group, value, expr) for expr in group.exprs_of(node)]
    if isinstance(value, LossValue):
        result = _reduced(build, stats, rows[0], value)
    elif len(rows) > 1:
        result = build(torch.stack, rows, value.kept)
    elif value.width > 1:
        last = len(shape_of(rows[0])) - 1
        result = rows[0] if value.kept == last else build(torch.movedim, rows[0], -1, value.kept)
    else:
        result = rows[0] if value.kept is None else build("unsqueeze", rows[0], value.kept)
    result = stats.layout.as_made(_done(build, tensor_of(node).dtype, result), node)  # type: ignore[union-attr]
    if value.detached and reading.timeline.grad_mode(group.place) is True:
        result = build("detach", result)
    if is_contiguous(node) and not is_contiguous(result):  # as where rows are cut off
        result = build("contiguous", result)
    edited = not reading.timeline.unchanged(node, node)
    return build("clone", result) if edited else result


def is_contiguous(node: Node) -> bool:
    """Whether an ordinary tensor is known to have its elements one behind another."""
    example = example_of(node)
    if not is_plain_tensor(example):
        return False
    sizes = example.shape
    behind = (math.prod(sizes[i + 1 :]) for i in range(len(sizes)))
    return all(equal(s, 1) or equal(*of) for s, *of in zip(sizes, example.stride(), behind, strict=True))


def _done(build: Builder, step: Afterwards, result: Node) -> Node:
    """What was to be done to each element, done to those that were picked."""
    if isinstance(step, Node):
        return build.again(step, {step.all_input_nodes[0]: result})
    if not isinstance(step, torch.dtype):
        return build(step, result)
    return result if tensor_of(result).dtype == step else build("to", result, step)  # type: ignore[union-attr]


def _rows(build: Builder, stats: Statistics, group: Group, value: Any, expr: sympy.Expr) -> Node:
    """A row expression, arranged as the user has his rows."""
    flat = stats.row(expr, getattr(value, "width", 1))
    for step in value.after:
        flat = _done(build, step, flat)
    ignored = value.reduction.ignore_index if isinstance(value, LossValue) else None
    for y in algebra.labels_of(expr):
        if y.is_nonnegative and group.labels[y].node is not None:
            flat = build(torch.mul, flat, stats.checked(y, ignored))
    flat = build("t", flat) if len(shape_of(flat)) == 2 else flat
    return arranged(build, flat, group.logits, value.steps)


def _reduced(build: Builder, stats: Statistics, per_row: Node, value: LossValue) -> Node:
    """As torch.nn.functional reduces: rows with an ignored label are 0 and do not count in the mean."""
    reduction = value.reduction
    if reduction.y is None:
        return _reduced_over_all(build, stats, per_row, reduction)
    label = stats.named[reduction.y]
    if not same_shape(shape_of(label), shape_of(per_row)):
        label = build("reshape_as", label, per_row)
    valid = build(torch.ne, label, reduction.ignore_index)
    kept = build(torch.where, valid, per_row, 0.0)
    if reduction.how == "none":
        return kept
    if reduction.how == "sum":
        return stats.layout.total(kept)
    counted = valid
    if reduction.weight is not None:
        weights = arranged(build, stats.entry(reduction.weight, reduction.y), value.logits, value.steps)
        counted = build(torch.where, valid, weights, 0.0)
    return stats.layout.mean(kept, counted)


def _reduced_over_all(build: Builder, stats: Statistics, per_row: Node, reduction: Reduction) -> Node:
    if reduction.how == "none":
        return per_row
    if reduction.how == "mean":
        return stats.layout.mean_of_all(per_row)
    total = stats.layout.total(per_row)
    if reduction.how == "sum":
        return total
    assert reduction.batch is not None
    return build(torch.div, total, first_size(build, reduction.batch))
