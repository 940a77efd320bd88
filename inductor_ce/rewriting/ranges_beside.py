"""A range of the classes of log-probabilities, read beside their loss: of the logits, less the normaliser.

    log_p = log_softmax(z)                  log_p = log_softmax(z)
    rest  = log_p[..., V:]             ->   rest  = z[..., V:] - log sum exp(z)
    loss  = log_p.gather(-1, y)             loss  = log_p.gather(-1, y)

A pointer network picks of the vocabulary, and takes all of the places that it may copy. Where the range has
at most half of the classes, the others need not be in memory for it. As log_softmax has it, all is taken
relative to the maximum.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.fx import Graph, Node

from .. import algebra
from ..common.compat.graphs import is_plain_tensor
from ..common.failsafe import attempt
from ..common.options import Options
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import example_of, hint, same_shape, shape_of, tensor_of
from ..graph.timeline import INFERENCE
from ..reading import spellings
from ..reading.row_views import index_per_dimension, row_shape
from ..reading.values import LossValue, Reading, RowValue, VocabValue, row_expr
from ..reading.views import cast_keeps
from .legal import few_classes
from .normalisers import needed_beside
from .some_classes import added_to_log_probabilities

LEFT = "a range of log-probabilities is left as it was"


def part_ranges(graph: Graph, reading: Reading, options: Options) -> bool:
    """Write those that may be so as differences. Returns whether there are any."""
    found: dict[Node, list[Node]] = defaultdict(list)
    for node in reading.timeline.nodes:
        log_p = _log_probabilities(reading, node)
        if log_p is not None:
            found[log_p].append(node)
    done = False
    for log_p, ranges in found.items():
        if _may_be(reading, log_p, ranges, options):
            done = attempt(LEFT, _rewrite, graph, reading, log_p, ranges)[1] is None or done
    return done


def _log_probabilities(reading: Reading, node: Node) -> Node | None:
    """Of what a node takes a range of at most half of the classes, of all rows, which no sum is read of."""
    source = node.args[0] if node.args else None
    value = reading.values.get(source) if isinstance(source, Node) else None
    if value is None or tensor_of(node) is None:
        return None
    if not any(spellings.is_step(node, name) for name in ("getitem", "narrow")):
        return None
    if node in reading.values or node in reading.looked_through or added_to_log_probabilities(value) is None:
        return None
    assert isinstance(source, Node)
    assert isinstance(value, VocabValue)
    rank, axis = len(shape_of(source)), value.axis
    if len(shape_of(node)) != rank or not same_shape(row_shape(node, axis), row_shape(source, axis)):
        return None
    if spellings.is_step(node, "getitem"):
        pieces = index_per_dimension(node.args[1], rank)
        rows = [] if pieces is None else [piece for d, piece in enumerate(pieces) if d != axis]
        if not rows or any(piece != slice(None) for piece in rows):
            return None
    return source if 2 * hint(shape_of(node)[axis]) <= hint(shape_of(source)[axis]) else None


def _may_be(reading: Reading, log_p: Node, ranges: list[Node], options: Options) -> bool:
    """Whether ranges can be of the logits, and nothing else needs the log-probabilities."""
    value, timeline = reading.values[log_p], reading.timeline
    assert isinstance(value, VocabValue)
    z, example = value.logits.node, tensor_of(value.logits.node)
    if example is None or not is_plain_tensor(example) or value.steps or value.axis != value.logits.axis:
        return False
    if few_classes(z, value.axis, options) or not cast_keeps(example.dtype, example_of(log_p).dtype):
        return False
    settled = all(timeline.unchanged(node, node) for node in (log_p, *ranges))
    if not settled or timeline.version(z, len(timeline.nodes)) != value.logits.version:
        return False
    modes = {timeline.grad_mode(node) for node in (log_p, *ranges)}
    if len(modes) > 1 or INFERENCE in modes or (True in modes and value.detached):
        return False
    return _has_loss(reading, log_p, value) and log_p not in needed_beside(reading, set(ranges))


def _has_loss(reading: Reading, log_p: Node, value: VocabValue) -> bool:
    """Whether rows of the very log-probabilities are read as a loss."""
    others = [v for v in reading.values.values() if isinstance(v, (RowValue, LossValue))]
    alike = (v for v in others if v.logits == value.logits and log_p in v.wide)
    return any(algebra.is_normalised(row_expr(v)) for v in alike)


def _rewrite(graph: Graph, reading: Reading, log_p: Node, ranges: list[Node]) -> None:
    value = reading.values[log_p]
    assert isinstance(value, VocabValue)
    axis, z, dtype = value.axis, value.logits.node, example_of(log_p).dtype
    added = added_to_log_probabilities(value)
    builds = [Builder(graph, ranges[0], like=ranges[0])]
    with undone_on_error(builds):
        build = builds[0]
        z = z if example_of(z).dtype == dtype else build("to", z, dtype)
        top = build(torch.amax, build("detach", z), axis, True)
        shifted = build(torch.sub, z, top)
        whole = build(torch.log, build(torch.sum, build(torch.exp, shifted), axis, True))
        results = []
        for node in ranges:
            builds.append(Builder(graph, node, like=node))
            build = builds[-1]
            part = build.again(node, {log_p: z})
            # So called, it is not read as of the same logits: of these it is not all classes.
            part = build(torch.sub, build(torch.ops.aten.sub.Tensor, part, top), whole)
            results.append(build(torch.add, part, added) if added else part)
        for build in builds:
            build.tell_gradients(reading.timeline.grad_mode(log_p) is True)
    for node, result in zip(ranges, results, strict=True):
        node.replace_all_uses_with(result)
        graph.erase_node(node)
