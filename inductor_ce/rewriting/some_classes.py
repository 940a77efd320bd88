"""The log of the probability of some classes: a normaliser over some of the log-probabilities.

logsumexp(log_softmax(z) + w), with w -inf for what a mask leaves out, is the difference of two normalisers,
of z + w and of z, and is written so: neither needs log-probabilities in memory. Both are taken relative to
the maximum of z, which then cancels before any rounding, as it does in log_softmax; but where a linear layer
makes z, whose head could not be in pieces then: the product has been rounded at the size of z already.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from .. import algebra
from ..common.compat.graphs import is_dtensor
from ..common.failsafe import attempt
from ..common.findings import name_of
from ..common.options import Options
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import example_of, hint, same_shape, shape_of, tensor_of
from ..graph.timeline import INFERENCE
from ..reading import spellings
from ..reading.values import Reading, Value, VocabValue
from ..reading.views import cast_keeps
from .normalisers import is_of_product, is_read_by_others, needed_beside
from .rewrite import beside_original

LEFT = "a normaliser of some classes is left as it was"


class Found(NamedTuple):
    """A logsumexp, the nodes between log-probabilities and it, first to last, and what is added to these."""

    node: Node
    log_p: Node
    path: tuple[Node, ...]
    added: float


def part_normalisers(graph: Graph, reading: Reading, options: Options) -> bool:
    """Write those that may be so as differences. Returns whether there are any."""
    found = [each for node in reading.timeline.nodes if (each := _read(reading, node)) is not None]
    found = [each for each in found if _may_be(reading, each, options)]
    errors = [attempt(LEFT, _rewrite, graph, reading, each, options.verify)[1] for each in found]
    return None in errors


def _read(reading: Reading, node: Node) -> Found | None:
    if not spellings.is_step(node, "logsumexp"):
        return None
    args = spellings.arguments_of(node)
    source, dim = args.get("input"), spellings.one_dim(args.get("dim"))
    path: list[Node] = []
    while isinstance(source, Node):
        added = added_to_log_probabilities(reading.values.get(source))
        if added is not None:
            on_classes = isinstance(dim, int) and dim % len(shape_of(source)) == reading.values[source].axis  # type: ignore[union-attr]
            return Found(node, source, tuple(path), added) if path and on_classes else None
        path.insert(0, source)
        source = _moved(source) if len(source.users) == 1 else None
    return None


def added_to_log_probabilities(value: Value | None) -> float | None:
    """What is added to log-probabilities, if that is what a value is."""
    if not isinstance(value, VocabValue) or value.after:
        return None
    constant = value.expr.get(algebra.ONE).subs(algebra.LSE_EXTENDED, algebra.LSE)
    added = algebra.expand(constant + algebra.LSE)
    is_log_p = value.expr + (-algebra.as_vocab(value.expr.get(algebra.ONE))) == algebra.LOGITS
    return float(added) if is_log_p and added.is_number else None


def _moved(node: Node) -> Node | None:
    """What a node is made of so that a number added to each row of that is added to each row of it."""
    spelled = spellings.read(node)
    if spelled is None:
        return None
    step, args = spelled
    moved: Any = None
    if step.name in ("add", "sub") and args.get("alpha", 1) == 1:
        moved = args.get("input")
        if step.name == "add" and not _has_shape_of(moved, node):
            moved = args.get("other")
    elif step.name == "masked_fill" and _is_minus_infinity(args.get("value")):
        moved = args.get("input")
    elif step.name == "where":
        a, b = args.get("input"), args.get("other")
        moved = b if _is_minus_infinity(a) else a if _is_minus_infinity(b) else None
    return moved if _has_shape_of(moved, node) else None


def _has_shape_of(arg: Any, node: Node) -> bool:
    """Whether an argument is a tensor of the shape, and dtype, of a node."""
    own, made = tensor_of(arg), tensor_of(node)
    return (
        own is not None and made is not None and own.dtype == made.dtype and same_shape(own.shape, made.shape)
    )


def _is_minus_infinity(arg: Any) -> bool:
    if isinstance(arg, Node) and name_of(arg) in ("tensor", "scalar_tensor") and len(arg.args) == 1:
        arg = arg.args[0]
    return isinstance(arg, float) and arg == -math.inf


def _may_be(reading: Reading, found: Found, options: Options) -> bool:
    """Whether the logits can be read in place of log-probabilities, and nothing else needs either."""
    value, timeline = reading.values[found.log_p], reading.timeline
    assert isinstance(value, VocabValue)
    z, place = value.logits.node, timeline.position[found.node]
    example = tensor_of(z)
    if example is None or is_dtensor(example) or value.steps or value.axis != value.logits.axis:
        return False
    if value.axis != len(shape_of(z)) - 1 or hint(shape_of(z)[value.axis]) < options.min_vocab:
        return False
    if not cast_keeps(example.dtype, example_of(found.log_p).dtype):
        return False
    if timeline.version(z, place) != value.logits.version:
        return False
    first = timeline.position[found.log_p]
    modes = {timeline.grad_mode(node) for node in (found.log_p, *found.path, found.node)}
    if len(modes) > 1 or INFERENCE in modes or (True in modes and value.detached):
        return False
    if not timeline.same_autocast(first, place):
        return False
    beside = [(arg, node) for node in found.path for arg in node.all_input_nodes]
    if not all(timeline.unchanged(arg, node, place) for arg, node in beside):
        return False
    needed = needed_beside(reading, {found.node, *found.path})
    return found.log_p not in needed and not is_read_by_others(reading, z, needed)


def _rewrite(graph: Graph, reading: Reading, found: Found, verify: bool) -> None:
    """Where no class is left, the result is -inf, and the normaliser of all has no part in it."""
    value, node = reading.values[found.log_p], found.node
    assert isinstance(value, VocabValue)
    args = spellings.arguments_of(node)
    build = Builder(graph, node, like=node)
    with undone_on_error([build]):
        axis, keepdim = value.axis, bool(args.get("keepdim"))
        z, dtype = value.logits.node, example_of(found.log_p).dtype
        z = z if example_of(z).dtype == dtype else build("to", z, dtype)
        part, made, own = z, found.log_p, is_of_product(z)
        if not own:
            top = build(torch.amax, build("detach", z), axis, True)
            # So called, it is not read as of the same logits: it is where others begin.
            part, z = build(torch.ops.aten.sub.Tensor, z, top), build(torch.sub, z, top)
        for each in found.path:
            sources = {source: source for source in each.all_input_nodes} | {made: part}
            part, made = build.again(each, sources), each
        part = build(torch.logsumexp, part, axis, keepdim)
        if own:
            whole = build(torch.logsumexp, z, axis, keepdim)
        else:  # of a row that holds +inf, the gradient is NaN
            whole = build(torch.log, build(torch.sum, build(torch.exp, z), axis, keepdim))
        is_finite = build(torch.isfinite, build("detach", whole))
        nan = build(torch.where, is_finite, 1.0, math.nan)  # as log-probabilities are
        whole = build(torch.mul, whole, nan)
        nothing = build(torch.logical_and, build(torch.eq, part, -math.inf), is_finite)
        result = build(torch.where, nothing, part, build(torch.sub, part, whole))
        if found.added:
            result = build(torch.add, result, found.added)
        build.tell_gradients(reading.timeline.grad_mode(node) is True)
    if verify:
        beside_original(graph, node, result)
        return
    node.replace_all_uses_with(result)
    for each in (node, *reversed(found.path)):
        graph.erase_node(each)
