"""Labels picked after probabilities are added or averaged: a pick of a sum is the sum of picks.

An ensemble, a mixture of softmaxes, or a pointer network takes log(softmax(a) + softmax(b)), and of it one
class a row. Picks are taken of the parts, which are losses; the mixture stays where something else reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import algebra
from ..common.failsafe import attempt
from ..common.options import Options
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import hint, same_shape, shape_of, tensor_of
from ..reading import spellings
from ..reading.context import Context, is_labels
from ..reading.losses import REDUCTIONS, modernised
from ..reading.picks import label_axis
from ..reading.values import LossValue, Reading, RowValue, VocabValue, row_expr
from .arrange import size_of
from .groups import wants_gradient
from .mixtures import Mixture
from .rewrite import beside_original, erase_with_sources

LEFT = "a mixture is picked from as it was written"


def pick_parts(graph: Graph, reading: Reading, options: Options) -> bool:
    """Pick of the parts of mixtures, where that may be. Returns whether there are any."""
    done = False
    for node in list(reading.timeline.nodes):
        source = _picked(reading, node)
        mixture = None if source is None else _mixture(reading, node, source, options)
        if mixture is not None:
            done |= attempt(LEFT, _rewrite, graph, mixture, node, source, options.verify)[1] is None
    return done


def _picked(reading: Reading, node: Node) -> Node | None:
    """What one class of each row is picked of, if that has no value."""
    spelled = spellings.read(node)
    if spelled is None or spelled[0].name not in ("gather", "nll_loss", "getitem"):
        return None
    (step, args), known = spelled, reading.on_logits(node)
    source: Any = args.get("input")
    is_read = isinstance(known, (RowValue, LossValue)) and algebra.is_normalised(row_expr(known))
    if tensor_of(source) is None or is_read:
        return None
    if isinstance(reading.values.get(source), VocabValue) or len(shape_of(source)) < 2:
        return None
    axis = _axis(reading, node, source)
    if axis is None:
        return None
    y = args.get("target")
    if step.name == "nll_loss":
        args = modernised(args)
        if args.get("weight") is not None or args.get("reduction", "mean") not in REDUCTIONS:
            return None
    else:
        y = args.get("index") if step.name == "gather" else args["index"][axis]
    if not is_labels(y):
        return None
    rows = tuple(s for i, s in enumerate(shape_of(source)) if i != axis)
    labelled = tuple(s for i, s in enumerate(shape_of(y)) if i != axis or step.name != "gather")
    return source if same_shape(labelled, rows) else None


def _axis(reading: Reading, node: Node, source: Node) -> int | None:
    """The dimension of the classes."""
    step, args = spellings.read(node)  # type: ignore[misc]
    if step.name == "nll_loss":
        return 1
    if step.name == "getitem":
        index = args.get("index")
        axis = label_axis(Context(reading, node), source, index) if isinstance(index, tuple) else None
        return axis if axis == len(shape_of(source)) - 1 == 1 else None
    dim = args.get("dim")
    return dim % len(shape_of(source)) if isinstance(dim, int) else None


def _mixture(reading: Reading, node: Node, source: Node, options: Options) -> Mixture | None:
    """What is picked of, if nothing but picks reads it or there is a backward."""
    axis, timeline = _axis(reading, node, source), reading.timeline
    assert axis is not None
    mixture = Mixture(reading)
    if hint(shape_of(source)[axis]) < options.min_vocab or not mixture.covers(source, axis):
        return None
    modes = {timeline.grad_mode(each) for each in (node, *mixture.inner)}
    same_autocast = all(timeline.same_autocast(each, node) for each in mixture.inner)
    picks = {user for user in source.users if _picked(reading, user) is source}
    fits = len(modes) == 1 and same_autocast and mixture.parts and source in mixture.inner
    if not fits or not (mixture.is_closed(picks) or _learns(reading, mixture)):
        return None
    return mixture


def _learns(reading: Reading, mixture: Mixture) -> bool:
    """Whether picks spare the mixture a backward, where it is kept for others."""
    values = [reading.on_logits(part) for part in mixture.parts]
    return any(v is not None and not v.detached and wants_gradient(v.logits) for v in values)


def _rewrite(graph: Graph, mixture: Mixture, node: Node, source: Node, verify: bool) -> None:
    reading = mixture.reading
    step, args = spellings.read(node)  # type: ignore[misc]
    axis = _axis(reading, node, source)
    assert axis is not None
    build = Builder(graph, node, like=node)
    pick = functools.partial(mixture.pick, build, source, axis=axis)
    with undone_on_error([build]):
        if step.name == "gather":
            result = pick(index=args["index"])
        elif step.name == "getitem":
            y = build("to", args["index"][axis], torch.int64)  # counts from the end where it is negative
            is_negative, above = build(torch.lt, y, 0), build(torch.add, y, size_of(build, source, axis))
            y = build(torch.where, is_negative, above, y)
            result = build("squeeze", pick(index=build("unsqueeze", y, 1)), 1)
        else:
            result = _nll_loss(build, pick, modernised(args))
        build.tell_gradients(reading.timeline.grad_mode(node) is True)
    if verify:
        beside_original(graph, node, result)
        return
    node.replace_all_uses_with(result)
    sources = node.all_input_nodes
    graph.erase_node(node)
    erase_with_sources(sources)


def _nll_loss(build: Builder, pick: Callable[..., Node], args: dict[str, Any]) -> Node:
    """As torch has it: rows whose label is ignored are 0, and are not counted."""
    y, how = args["target"], args.get("reduction", "mean")
    counts = build(torch.ne, y, args.get("ignore_index", -100))
    index = build("unsqueeze", build("to", build(torch.where, counts, y, 0), torch.int64), 1)
    picked = build("squeeze", pick(index=index), 1)
    rows = build(torch.where, counts, build(torch.neg, picked), 0.0)
    if how == "none":
        return rows
    total = build(torch.sum, rows)
    return total if how == "sum" else build(torch.div, total, build(torch.sum, counts))
